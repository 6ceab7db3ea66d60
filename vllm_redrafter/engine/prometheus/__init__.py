# SPDX-License-Identifier: Apache-2.0
"""``redrafter_*`` at vLLM's own ``/metrics``: from a worker's counters to the front end's.

A worker cannot speak to the endpoint. In most layouts of processes it is not in the front end's,
and possibly not on its machine. vLLM's own figures go from the scheduler to one of the front ends
with a step's outputs (``SchedulerStats``), and have one field that a worker fills and that the
scheduler hands on as it is: the statistics of an encoder-cache connector, a dictionary. ReDrafter
has no such connector, and its counters travel there:

    worker (``sender``) -> ModelRunnerOutput -> scheduler -> SchedulerStats
                        -> front end (``logger``, ``receiver``)

So they arrive wherever vLLM's do, data-parallel engines under their own label and several API
servers through vLLM's multiprocess mode, because what travels is what was counted since the last
message. Nothing in the engine core is replaced. In the front end one constructor is wrapped: our
logger stands before vLLM's and takes the dictionary away. vLLM's entry point for stat loggers would
do that too, but it turns statistics on for everybody who has this package installed, also for who
never asked for ReDrafter, and a ``LLM`` does not look at it.

``catalog`` lists the metrics.
"""
