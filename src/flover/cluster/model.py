"""`ModelCost` of a checkpoint folder: its config.json says all that the cost model needs."""

from __future__ import annotations

from pathlib import Path

import torch

from flover.cluster.cost import ModelCost, Weights, product_dtype
from flover.config import DTYPE_BYTES, EngineConfig
from flover.model_config import ModelConfig
from flover.models.loader import resolve_model, weight_parts
from flover.resolve import effective_dtype, kv_bytes_per_token, kv_dtype


def model_cost(config: EngineConfig) -> tuple[Path, ModelCost]:
    """A model as a GPU would load it with these settings; no weight is read, none need be there.

    Raises:
        ValueError: a model that is not there or not known.
    """
    folder = resolve_model(config.model)
    model = ModelConfig.from_folder(folder)
    dtype = effective_dtype(config, model, "cuda")
    parts = weight_parts(folder, model, getattr(torch, dtype), config.quantization)
    kv_bytes = kv_bytes_per_token(model, kv_dtype(config, dtype)) // model.kv_elements_per_token
    return folder, ModelCost(
        model,
        Weights(*parts["layer"]),
        Weights(*parts["head"]),
        Weights(*parts["embedding"]),
        product_dtype(dtype, config.quantization),
        DTYPE_BYTES[dtype],
        kv_bytes,
    )
