"""The servers: where a request goes, when, and what happens when it fails. README.md has the whole picture.

In reading order:

    server_spec, discovery      which servers are wanted: configuration, file, DNS name
    membership                  adds and removes them, ejects, probes and readmits them, watches their load
    models                      which models are used, and which one writes a draft
    fleet                       `open_fleet`, `Fleet.complete`: place, try, retry
    server                      the state of one server
    placement                   which server a request goes to, and when
    sharing, shares             many runs over the same servers: each has a fleet, and a fair share of places
    affinity, prefixes          a prefix group stays at one server; its prefix is warmed up once
    limiter, health             how many requests a server gets; when it is ejected; when a run gives up
    hedging                     second tries for the last stragglers
    client, wire, logprobs      what one server is sent, and what its answers mean
    transport, retry_after      HTTP and TLS; how long a server asks to wait
    routers                     warns of a router that splits prefix groups
    weight_update               new weights for a running server, used by the trainer
    launch                      starts a local SGLang server for the length of a run
"""
