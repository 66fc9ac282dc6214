"""Throughput of a fleet on this workload: `streamsyn bench`.

    load -> stages of a run -> recorder -> Measurement with its steady state -> figures -> verdict -> reports

A run of the real recipe, workers and fleet is recorded; everything that is reported is computed from that
record. README.md has the guide.
"""
