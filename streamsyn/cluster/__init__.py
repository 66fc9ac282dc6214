"""SGLang servers on the nodes of a Ray cluster: placed, restarted, added and removed while a run goes on.

Modules:
    replica: One server on its node or nodes: the actor that Ray places.
    placing: Keeps as many servers alive as there is work for, and lists those that are.
    coordinator: The run itself as an actor, which is started again on another node (`streamsyn submit`).
    scaling: The rule for how many that are.
    spread: Work on the shards of a log, by Ray Data.
"""
