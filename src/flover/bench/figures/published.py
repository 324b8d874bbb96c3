"""What the paper reports, as data (arXiv 2305.13484, HiPC 2023; numbers read from the labels of its figures).

Seconds unless said. FasterTransformer (FT) ran as concurrent instances, on Ampere GPUs that the paper does not name.
A request is 8 prompt and 504 output tokens. Speed-ups over FT are the paper's; FT's seconds are their product.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Published(NamedTuple):
    """A model of Fig. 4a: GPUs, and by number of requests Flover's seconds and its speed-up over FT."""

    gpus: int
    seconds: tuple[float, ...]
    speedup: tuple[float, ...]

    @property
    def single(self) -> float:
        return self.seconds[0]


INTERVAL = 0.5  # seconds between arrivals in Fig. 4: (T32 - T1) / 31 of every model
REQUESTS = (1, 2, 4, 8, 16, 32)
FIG_4A = {
    "gptj-6b": Published(1, (5.6, 6.1, 7.1, 9.2, 13.2, 21.2), (1.0, 1.8, 2.4, 3.5, 5.9, 10.9)),
    "llama-13b": Published(1, (9.1, 9.6, 10.6, 12.7, 16.9, 24.9), (1.0, 1.6, 2.5, 3.5, 6.0, 11.7)),
    "llama-33b": Published(2, (13.6, 14.1, 15.6, 17.7, 21.9, 30.3), (1.0, 1.8, 2.7, 3.5, 6.5, 13.4)),
    "llama-65b": Published(4, (10.8, 11.4, 12.5, 14.4, 18.7, 27.2), (1.0, 1.9, 3.0, 3.9, 7.5, 16.7)),
}
FIG_4C = {  # mean latency over single-request latency at 8, 16 and 32 requests
    "gptj-6b": (1.03, 1.04, 1.05),
    "llama-13b": (1.02, 1.04, 1.05),
    "llama-33b": (1.05, 1.07, 1.09),
    "llama-65b": (1.01, 1.05, 1.13),
}
PROGRESS: dict[str, Any] = {
    "flover_ends_s": 26.4,
    "dynamic_16s_ends_s": 32.1,
    "concurrent_done_at_37s": 0.13,
    "windows_s": (2, 4, 8, 16),
}
POISSON_SINGLE = 5.8  # the single request of Fig. 8 and of v1 Fig. 7, GPT-J
FIG_8: dict[str, Any] = {  # mean gap of the arrivals in ms, 32 requests
    "gap_ms": (20, 50, 100, 150, 200, 300, 400, 500, 750, 1000, 2000, 3000, 4000, 5000),
    "iterations": (557, 616, 748, 888, 911, 1174, 1366, 1537, 2239, 2621, 5483, 7738, 8902, 10694),
    "overlap_percent": (91.3, 81.8, 67.3, 62.1, 60.3, 45.2, 36.7, 31.0, 23.2, 20.0, 9.3, 6.7, 5.7, 4.8),
    "speedup": (11.2, 11.1, 10.2, 9.3, 9.1, 7.9, 7.1, 6.5, 4.5, 4.2, 2.1, 1.3, 1.3, 1.1),
    "step_time_29_rows_over_1": 2.0,
}
FIXED: dict[str, Any] = {  # v1 Fig. 7, 8 requests: interval in ms -> per-request batch -> (FT, Flover)
    "500": {"1": (34.36, 10.24), "4": (35.74, 11.69)},
    "2500": {"1": (36.40, 23.48), "4": (37.61, 23.75)},
    "5000": {"1": (42.19, 40.72), "4": (42.71, 40.89)},
}
RANDOM_INTERVAL = 0.02
RANDOM: dict[str, Any] = {  # outputs uniform(128, upper); the gain is time without the shuffle over time with it
    "v1_fig_9a_32_requests": {
        "upper": (256, 384, 512, 768),
        "ft_s": (42.1, 46.3, 53.3, 61.5),
        "off_s": (4.52, 6.89, 9.48, 15.68),
        "shuffle_s": (3.93, 5.33, 6.57, 9.08),
    },
    "v1_fig_9b_16_requests": {
        "upper": (256, 384, 512, 768, 1024, 1280, 1536, 1792),
        "gain": (1.29, 1.31, 1.30, 1.42, 1.60, 1.56, 1.78, 1.93),
    },
}
SHUFFLE: dict[str, Any] = {  # HiPC mem_shuffle, by maximum length; the release copies about 1 KB of each slot's K and V
    "max_len": (512, 1024, 1536, 2048),
    "llama-13b": {
        "ft_s": (172.8, 366.8, 472.1, 589.3),
        "off_s": (24.8, 34.6, 44.6, 54.6),
        "shuffle_s": (21.5, 29.0, 37.0, 44.3),
    },
    "llama-65b": {
        "ft_s": (253.8, 627.0, 883.4, 1265.9),
        "off_s": (27.2, 40.2, 53.4, 66.5),
        "shuffle_s": (23.9, 33.4, 44.0, 54.1),
    },
}
TENSOR_PARALLEL: dict[str, Any] = {  # v1 Fig. 10: (without, with shuffle), mean of 5 runs; length is the upper bound
    "2": {"length_1000_by_requests": {"16": (20.9, 14.3), "32": (40.9, 25.6), "48": (57.3, 34.4)}},
    "4": {
        "length_2400_by_requests": {"16": (79.9, 34.2), "32": (138.1, 55.9), "48": (166.6, 79.8)},
        "length_7200": (311.8, 94.5),
    },
    "8": {"length_16000_8_requests": (251.1, 167.9)},
}
MEMORY: dict[str, Any] = {
    "tensorrt_llm_gb": 36,
    "flover_gb": {"32": 20, "64": 23},
    "note": "K and V share one buffer in the release, so its memory is half of a true cache's; no target",
}
