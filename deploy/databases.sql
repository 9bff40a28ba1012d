-- Prefect, MLflow and the studies each keep a table of schema versions of the same name, so each has its own database.
create database prefect;
create database mlflow;
create database studies;
