"""The servers: where a request goes, when, and what happens when it fails. README.md has the whole picture.

In reading order:

    server_spec, discovery      which servers are wanted: configuration, file, DNS name; a warning of routers
    told_servers                the servers of a coordinator on a cluster, of which another process tells
    membership                  adds and removes them, ejects, probes and readmits them, watches their load
    models                      which models are used, and which one writes a draft
    fleet, try_outcomes         `open_fleet`, `Fleet.complete`: place, try, retry; what an outcome changes
    server                      the state of one server and of its data-parallel ranks
    affinity                    a prefix group stays at one server, and at one of its ranks
    placement                   which server a request goes to, and when
    shared_servers, shares      many runs over the same servers: each has a fleet, and a fair share of places
    prefixes                    the prefixes that a server has in its cache; each is warmed up once
    limiter, kv_pool, health    how many requests a server gets; when it is ejected; when a run gives up
    hedging                     second tries for the last stragglers
    client, wire                what one server is sent
    chat_answer, logprobs       what its answers mean
    thinking                    thoughts: switched on and off, and cut from answers
    transport, http_connections    HTTP and TLS; how long a server asks to wait; requests without a session
    weight_update               new weights for a running server, used by the trainer
    launch                      starts a local SGLang server for the length of a run
"""
