"""One Prefect task per stage: records in, records out, one call into qwen3ft each.

Arguments and results are JSON, so results can be cached across runs. Retries happen only where a
network is used, only for `TransientError`, and are never nested: a failed training attempt is
answered by the flow's own loop.
"""
