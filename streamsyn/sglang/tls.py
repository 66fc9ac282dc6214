"""Which https servers are trusted, and who we are to them."""

import ssl
from pathlib import Path

from streamsyn.errors import ConfigError
from streamsyn.sections import FleetSection


def tls_context(section: FleetSection) -> ssl.SSLContext | None:
    """What `fleet.tls_ca` and `fleet.tls_cert` say; None when neither is set: the system's way.

    Reads files: to be called before the event loop runs, or in a thread.

    Raises:
        ConfigError: A file cannot be read, or does not hold what it should.
    """
    if section.tls_ca is None and section.tls_cert is None:
        return None
    context = _trusting(section.tls_ca)
    context.set_alpn_protocols(["http/1.1"])  # as aiohttp's own do
    if section.tls_cert is not None:
        _identify(context, section.tls_cert)
    return context


def _trusting(authorities: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=authorities)
    except ssl.SSLError as error:
        raise ConfigError(
            f"fleet.tls_ca: {authorities} holds no PEM certificates ({error.reason})"
        ) from error
    except OSError as error:
        raise ConfigError(f"fleet.tls_ca: cannot read {authorities}: {error.strerror}") from error


def _identify(context: ssl.SSLContext, certificate: Path) -> None:
    try:
        # Without a password of ours OpenSSL would ask for one at the terminal.
        context.load_cert_chain(certificate, password="")
    except ssl.SSLError as error:
        raise ConfigError(
            f"fleet.tls_cert: {certificate} must hold a PEM certificate and its key, without a pass phrase"
            f"{_why(error)}"
        ) from error
    except OSError as error:
        raise ConfigError(f"fleet.tls_cert: cannot read {certificate}: {error.strerror}") from error


def _why(error: ssl.SSLError) -> str:
    """OpenSSL's reason, where it has one."""
    return f" ({error.reason})" if error.reason else ""
