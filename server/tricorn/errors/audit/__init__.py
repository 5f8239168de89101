"""The audit: proves the rules of the error path on source, of Tricorn or of an agent. Nothing is imported or run."""

from tricorn.errors.audit.program import defines, locate, python_files
from tricorn.errors.audit.rules import Finding, audit
from tricorn.errors.audit.shadows import shadows

__all__ = ["Finding", "audit", "defines", "locate", "python_files", "shadows"]
