"""The one tree of errors.

Every error a user can cause has a stable ``code``. The command line prints it, the HTTP server sends it as ``error.code`` with
``http_status``, and programs may branch on it; the message may change, the code may not. Each class is also the standard exception that it
refines, so ``except ValueError`` keeps working.

    ZenTurboError
      InvalidRequestError (ValueError)         invalid_request           400
        EmptyPromptError                       empty_prompt              400
        ContextLengthExceededError             context_length_exceeded   400
        UnsupportedParameterError              unsupported_parameter     400
        RequestTooLargeError                   request_too_large         413
        FileQuotaExceededError                 file_quota_exceeded       400
      InvalidApiKeyError (PermissionError)     invalid_api_key           401
      ForbiddenOriginError (PermissionError)   forbidden_origin          403
      RateLimitExceededError (RuntimeError)    rate_limit_exceeded       429
      ConfigurationError (ValueError)          invalid_configuration     400
      ModelNotFoundError (LookupError)         model_not_found           404
      CheckpointError (ValueError)             invalid_checkpoint        500
        CorruptFileError                       corrupt_file              500
        UnsupportedModelError                  unsupported_model         500
      DownloadError (OSError)                  download_failed           500
        ChecksumMismatchError                  checksum_mismatch         500
      DocumentError (ValueError)               unreadable_document       400
        DocumentNotFoundError                  document_not_found        400
        BinaryDocumentError                    binary_document           400
        EncryptedDocumentError                 encrypted_document        400
        DocumentTooLargeError                  document_too_large        400
        DocumentTimeoutError                   document_timeout          400
      UploadedFileNotFoundError (LookupError)  file_not_found            404
      ReadersBusyError                         readers_busy              429
      InsufficientMemoryError (MemoryError)    insufficient_memory       429
      KernelError (RuntimeError)               kernel_unavailable        500
      RequestCancelledError (RuntimeError)     request_cancelled         499
        ShuttingDownError                      shutting_down             503

Assertions are for our own invariants and never for input.
"""

from __future__ import annotations

from typing import Any


class ZenTurboError(Exception):
    """Base of every error raised on purpose.

    ``details`` holds JSON-serialisable facts (both numbers where a limit is involved); ``param`` names the offending request field.
    """

    code = "internal_error"
    http_status = 500

    def __init__(self, message: str, *, param: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.details = details

    def __reduce__(self):
        return _rebuild, (type(self), self.message, self.param, self.details)


def _rebuild(kind: type[ZenTurboError], message: str, param: str | None, details: dict[str, Any]) -> ZenTurboError:
    error = kind.__new__(kind)
    ZenTurboError.__init__(error, message, param=param, **details)
    return error


def shown(value: object) -> str:
    """What a client sent, for a message: its ``repr``, cut where it is long, since it may be megabytes."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


class InvalidRequestError(ZenTurboError, ValueError):
    code = "invalid_request"
    http_status = 400


class EmptyPromptError(InvalidRequestError):
    code = "empty_prompt"


class ContextLengthExceededError(InvalidRequestError):
    """The prompt plus the answer does not fit; ``n_prompt_tokens`` and ``n_ctx`` carry both numbers."""

    code = "context_length_exceeded"

    def __init__(self, *, num_prompt_tokens: int, max_tokens: int, max_model_len: int, param: str | None = "messages") -> None:
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens. However, your messages resulted in "
            # LangChain recognises an overflow by the last words, LiteLLM by the first.
            f"{num_prompt_tokens} tokens plus {max_tokens} for the answer: the prompt is too long for that.",
            param=param,
            n_prompt_tokens=num_prompt_tokens,
            n_ctx=max_model_len,
        )


class UnsupportedParameterError(InvalidRequestError):
    code = "unsupported_parameter"


class InvalidApiKeyError(ZenTurboError, PermissionError):
    code = "invalid_api_key"
    http_status = 401


class ForbiddenOriginError(ZenTurboError, PermissionError):
    """A browser says that the request comes from a page of another site, or was sent to a name that is not this server's."""

    code = "forbidden_origin"
    http_status = 403


class RequestTooLargeError(InvalidRequestError):
    """More bytes than are accepted; ``num_bytes`` (at least so many came or were announced) and ``max_bytes`` carry both numbers."""

    code = "request_too_large"
    http_status = 413

    def __init__(self, what: str, *, num_bytes: int, max_bytes: int, param: str | None = "file") -> None:
        super().__init__(
            f"{what} has {num_bytes} bytes or more; at most {max_bytes} are accepted.", param=param, num_bytes=num_bytes, max_bytes=max_bytes
        )


class FileQuotaExceededError(InvalidRequestError):
    """Uploaded files take all the room they may; ``need`` and ``have`` (left) carry both numbers, in ``unit``."""

    code = "file_quota_exceeded"

    def __init__(self, *, need: int, have: int, unit: str = "bytes") -> None:
        super().__init__(
            f"The file needs {need} {unit} but only {have} are left of what uploaded files may take; delete some.",
            param="file",
            need=need,
            have=have,
            unit=unit,
        )


class RateLimitExceededError(ZenTurboError, RuntimeError):
    """Too much at once; the same request may work later. ``reason``: which limit. ``retry_after_s``: when to try again, in seconds."""

    code = "rate_limit_exceeded"
    http_status = 429

    def __init__(self, message: str, *, reason: str, limit: int, retry_after_s: int) -> None:
        super().__init__(message, reason=reason, limit=limit, retry_after_s=retry_after_s)


class ConfigurationError(ZenTurboError, ValueError):
    code = "invalid_configuration"
    http_status = 400


class ModelNotFoundError(ZenTurboError, LookupError):
    code = "model_not_found"
    http_status = 404


class CheckpointError(ZenTurboError, ValueError):
    code = "invalid_checkpoint"


class CorruptFileError(CheckpointError):
    code = "corrupt_file"


class UnsupportedModelError(CheckpointError):
    code = "unsupported_model"


class DownloadError(ZenTurboError, OSError):
    code = "download_failed"


class ChecksumMismatchError(DownloadError):
    code = "checksum_mismatch"


class DocumentError(ZenTurboError, ValueError):
    code = "unreadable_document"
    http_status = 400


class DocumentNotFoundError(DocumentError):
    code = "document_not_found"


class BinaryDocumentError(DocumentError):
    code = "binary_document"


class EncryptedDocumentError(DocumentError):
    code = "encrypted_document"


class DocumentTooLargeError(DocumentError):
    """Reading would exceed a limit; ``details`` holds it as ``max_...``, and beside it what was found."""

    code = "document_too_large"


class DocumentTimeoutError(DocumentError):
    """Reading took longer than ``max_cpu_s`` or ``max_wall_s`` seconds."""

    code = "document_timeout"


class UploadedFileNotFoundError(ZenTurboError, LookupError):
    code = "file_not_found"
    http_status = 404


class ReadersBusyError(ZenTurboError):
    """As many documents of requests are being read as may be at once."""

    code = "readers_busy"
    http_status = 429


class InsufficientMemoryError(ZenTurboError, MemoryError):
    """The request needs more memory than there is; ``need_bytes`` and ``have_bytes`` carry both numbers."""

    code = "insufficient_memory"
    http_status = 429

    def __init__(self, what: str, *, need_bytes: int, have_bytes: int) -> None:
        super().__init__(
            f"{what} needs {need_bytes / 2**30:.2f} GiB but only {have_bytes / 2**30:.2f} GiB can be used.",
            need_bytes=need_bytes,
            have_bytes=have_bytes,
        )


class KernelError(ZenTurboError, RuntimeError):
    code = "kernel_unavailable"


class RequestCancelledError(ZenTurboError, RuntimeError):
    code = "request_cancelled"
    http_status = 499


class ShuttingDownError(RequestCancelledError):
    code = "shutting_down"
    http_status = 503
