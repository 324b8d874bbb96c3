"""The fused loop: engine > executor > runner; scheduler > policy; all > batch."""
