"""The only door to Prefect: runs, servers, workers, deployments and what they leave behind."""
