"""SGLang without a model, for tests, benchmarks and planning. README.md says what is imitated, and what not.

In reading order:

    settings, timeline               what to simulate: configuration and faults, events in a server's life
    app, in_process                  two ways in: HTTP, or calls within the process
    protocol, routes                 requests, replies, and all routes over either way
    generation, chat, native         the routes that generate or score
    completion_request, texts        what is asked and what is answered
    simulation                       one server's state; runs a request in its engine
    engine                           the interface of the two engines
    plain_engine                     each request on its own clock
    data_parallel                    several engines behind one server
    costs, batching, scheduler, radix_cache    continuous batching as SGLang does it
    weights                          pauses and weight updates
    cpu_time                         what simulated servers take of the CPU time of their client's process
    virtual_time                     an event loop whose clock jumps to the next timer
"""
