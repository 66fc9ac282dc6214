"""A server on CPU that speaks the wire protocol of SGLang 0.5.23, with latency, prefix caching and faults on demand.

Nothing is imported here, so that the command line stays fast: `config` and `faults` are light, `app` brings aiohttp.
"""
