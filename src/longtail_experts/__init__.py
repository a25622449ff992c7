"""Calibrated long-tail experts, trained and recorded with MLflow."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longtail_experts.tracking.logits import ExpertLogits, load_expert_logits

__all__ = ["ExpertLogits", "load_expert_logits"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # torch and mlflow take seconds to import
    if name in __all__:
        from longtail_experts.tracking import logits

        return getattr(logits, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
