"""The record: MLflow runs, their artifacts, figures and reports. Alone in importing mlflow."""
