"""Errors of the library: each message names the thing, the value and the cure."""


class SarmlibError(Exception):
    """Base class of every error that sarmlib raises on purpose."""


class ConfigError(SarmlibError, ValueError):
    """A setting is missing, unknown, of the wrong type or out of range."""


class DataError(SarmlibError, ValueError):
    """An input row, file or text cannot be used as it is."""


class ModelError(SarmlibError, ValueError):
    """A checkpoint or model does not have the parts that are needed."""


class ArtifactError(SarmlibError):
    """A stored artifact is damaged, locked or incomplete."""


class NotMadeError(ArtifactError):
    """A read-only store was asked for an artifact that has not been made yet."""


class OfflineError(SarmlibError):
    """A hub resource is needed and cannot be reached; the message names the offline alternative."""


class EndpointError(SarmlibError):
    """A chat endpoint refused, does not answer, or would cost more than the budget."""


class ClaimError(SarmlibError, AssertionError):
    """A checked claim left its band, or a claims file is malformed."""
