"""A finished folder in the layouts that other servers and people take."""

from slimfuse_export.packaging.archive import write_zip
from slimfuse_export.packaging.kserve import write_kserve
from slimfuse_export.packaging.triton import write_triton

__all__ = ["write_kserve", "write_triton", "write_zip"]
