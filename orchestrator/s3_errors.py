"""What an S3 failure means, in plain words, and what to do about it. No word of the server's is repeated: it may quote
the request, and with it what should stay secret.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN if there is one), or AWS_PROFILE"
REDIRECT = "set AWS_ENDPOINT_URL_S3 to the final address (https?), or AWS_DEFAULT_REGION to the bucket's region"
_ANSWERS = (  # error codes (HEAD answers carry only a number), what they mean, what to do
    (
        ("NoSuchBucket", "404"),
        "there is no bucket {bucket!r} at {endpoint}",
        "create it, or correct the address or AWS_ENDPOINT_URL_S3",
    ),
    (
        ("AccessDenied", "403", "Forbidden"),
        "{endpoint} denied {operation} on bucket {bucket!r}",
        "check the credentials; they must allow s3:ListBucket, and s3:GetObject, s3:PutObject and "
        "s3:AbortMultipartUpload on the objects",
    ),
    (
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"),
        "{endpoint} does not accept the AWS credentials",
        _CREDENTIALS,
    ),
    (
        ("PermanentRedirect", "TemporaryRedirect", "301", "302", "307", "308"),
        "{endpoint} redirects to somewhere else",
        REDIRECT,
    ),
    (
        ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"),
        "bucket {bucket!r} is in another region",
        "set AWS_DEFAULT_REGION to the bucket's region",
    ),
    (("RequestTimeTooSkewed",), "{endpoint} says that this machine's clock is wrong", "set the clock"),
    (  # a HEAD answer has no code: an expired token looks like another region
        ("400",),
        "{endpoint} refused {operation} on bucket {bucket!r} without saying why",
        "check the AWS credentials, whether AWS_SESSION_TOKEN has expired, and AWS_DEFAULT_REGION",
    ),
    (
        ("QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "507"),
        "{endpoint} has no room left for bucket {bucket!r}",
        "free space there or raise the quota, then run again",
    ),
    (("SlowDown", "ServiceUnavailable", "503"), "{endpoint} is overloaded", "try again later"),
)


def error_code(error: Any) -> str:
    """The server's word for what went wrong; of a HEAD answer its number."""
    return str(error.response.get("Error", {}).get("Code", "no code"))


def status_of(error: Any) -> int:
    """The HTTP status of the answer; 0 if it had none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def explain_answer(code: str, operation: str, bucket: str, endpoint: str) -> tuple[str, str]:
    """Return (what, remedy) for the error `code` that the server answered to `operation`."""
    for codes, what, remedy in _ANSWERS:
        if code in codes:
            return what.format(bucket=bucket, endpoint=endpoint, operation=operation), remedy
    return f"{endpoint} answered {operation} with {code}", "look this code up in the server's documentation"


def explain_failure(error: Exception, endpoint: Callable[[], str]) -> tuple[str, str]:
    """Return (what, remedy) for a botocore exception, known by the names of its classes: no request was answered.

    endpoint: gives the server's address; not called where there may be none.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    name = type(error).__name__
    if kinds & {"NoCredentialsError", "PartialCredentialsError"}:
        return "no AWS credentials were found", _CREDENTIALS
    if kinds & {"CredentialRetrievalError", "ProfileNotFound", "SSOError", "LoginError"}:
        return f"the AWS credentials cannot be read ({name})", _CREDENTIALS
    if "SSLError" in kinds:
        return f"no trusted connection to {endpoint()}", "set AWS_CA_BUNDLE to the file of the server's authority"
    if kinds & {"ConnectionError", "HTTPClientError", "IncompleteReadError", "ResponseParserError"}:
        return (
            f"no answer, or half of one, from {endpoint()} ({name})",
            "see that the server runs, and that AWS_ENDPOINT_URL_S3 is its address",
        )
    return f"boto3 refused ({name})", "check the AWS configuration and environment variables"
