"""The cache inside transformers: `attach`, and the `LessCache` that an attached model keeps."""

from .attachment import Attachment, attach
from .cache import LessCache

__all__ = ["Attachment", "LessCache", "attach"]
