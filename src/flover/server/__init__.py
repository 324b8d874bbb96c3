"""The OpenAI server: `flover serve`. HTTP, its limits, and metrics around one `AsyncLLM`; needs `flover[server]`."""
