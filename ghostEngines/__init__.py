"""Per-sample train-validation gradient dot products inside the backward pass of training, for any loop."""

from .errors import AttachError, RowsError
from .exact_values import ExactValues
from .graddotprod_engine import GradDotProdEngine
from .layer_rules import RULES, CrossEntropyHead, register_rule, register_unit
from .losses import are_by_target, losses_by_target, per_sample_losses
from .row_maps import packed_documents
from .scoring import Scoring
from .update_rules import Update, UpdateRule, register_update_rule
from .verification import Report, verify

__version__ = "0.1.0"

__all__ = [
    "RULES",
    "AttachError",
    "CrossEntropyHead",
    "ExactValues",
    "GradDotProdEngine",
    "Report",
    "RowsError",
    "Scoring",
    "Update",
    "UpdateRule",
    "are_by_target",
    "losses_by_target",
    "packed_documents",
    "per_sample_losses",
    "register_rule",
    "register_unit",
    "register_update_rule",
    "verify",
]
