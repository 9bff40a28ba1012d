"""The methods: torch only. Runs in a notebook without Prefect or MLflow."""
