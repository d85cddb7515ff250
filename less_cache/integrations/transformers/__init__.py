"""The cache inside transformers: `attach`, and the `LessCache` that an attached model keeps."""

from ._required import REQUIRED
from .attachment import Attachment, attach
from .cache import LessCache
from .forward import FullAttentionWarning

__all__ = ["REQUIRED", "Attachment", "FullAttentionWarning", "LessCache", "attach"]
