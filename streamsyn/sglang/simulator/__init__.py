"""A server on CPU that speaks the wire protocol of SGLang 0.5.23, with latency, prefix caching and faults.

Nothing is imported here, so that the command line stays fast: `config`, `faults` and `command` are light,
`app` brings aiohttp.
"""
