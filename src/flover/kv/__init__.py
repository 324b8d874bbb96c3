"""KV cache: plain host allocators (`slab`, `paged`) behind one `protocol`, and the tensors (`storage`)."""
