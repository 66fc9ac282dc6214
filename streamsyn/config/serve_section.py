"""The keys of `streamsyn serve`."""

from pathlib import Path

from streamsyn.config.fields import Count, CountOrZero, Positive, Seconds, Section


class ServeSection(Section):
    """The daemon: where it listens, who may use it, and its limits."""

    listen: str = "127.0.0.1:8200"
    """`HOST:PORT` to listen at. `--listen` on the command line replaces it. An address that other machines
    can reach needs `serve.tokens_file`. Port 0 picks a free one."""
    tokens_file: Path | None = None
    """A file with one token a line: `NAME SCOPE[,SCOPE] TOKEN`, or `sha256:` and the SHA-256 of the token in
    hexadecimal in its place. The scopes are `read`, `write` (includes `read`) and `admin` (includes both).
    Clients send `Authorization: Bearer TOKEN`. By default everyone on this machine may do everything."""
    tls_certificate: Path | None = None
    """PEM file with the certificate to serve https with, and its chain."""
    tls_key: Path | None = None
    """PEM file with the key of the certificate. By default it is in the same file."""
    max_body_bytes: Count = 2**30
    """Maximum bytes of the body of a request, as sent and decompressed."""
    max_line_bytes: Count = 8 * 2**20
    """Maximum bytes of one line of seeds or of a batch. `seeds.max_line_bytes` holds too."""
    max_connections: Count = 4096
    """Maximum number of open connections. A further one is answered with 503 and closed."""
    requests_per_s: Positive = 1000.0
    """Requests per second of one client: a token, or an address where there are no tokens. Up to this many
    may come at once. A further one is answered with 429 and `Retry-After`."""
    idle_timeout_s: Seconds = 75.0
    """Seconds after which a connection without a request is closed."""
    body_timeout_s: Seconds = 30.0
    """Maximum seconds until a request's head is complete, and between two pieces of its body."""
    max_unread_seeds: Count = 10_000
    """Number of accepted seeds of a run that wait to be taken up, from which on the daemon reads no more."""
    allow_recipes: tuple[str, ...] = ()
    """Recipes of your own that clients may use, as in `recipe.use`, such as `my_package.recipes:Mine`."""
    allow_private_webhooks: bool = False
    """Whether webhooks may go to addresses of this machine and of private networks."""
    min_free_bytes: CountOrZero = 2**30
    """Free bytes on the disk below which runs are paused. They go on when there is twice as much."""
    retain_s: Seconds | None = None
    """Seconds after which mirrored shards that every consumer has acknowledged are deleted. By default
    they are kept."""
    retain_bytes: Count | None = None
    """Bytes of the shards of one run above which the oldest mirrored ones that every consumer has
    acknowledged are deleted. By default they are kept."""
