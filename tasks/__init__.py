"""The rim: handles in, handles out. Store, cache, MLflow and Prefect tasks around pure functions."""
