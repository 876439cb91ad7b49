"""Where the method meets vLLM: the only package (with patches and eval) that imports it.

Two processes, one direction of command:

* scheduler side (engine core process): ``scheduler`` and ``planner`` decide which request is
  compacted to how many blocks after which step; ``cache_manager`` keeps vLLM's block accounting
  right.
* worker side (one process per rank): ``worker`` runs the orders after the forward pass; ``state``
  remembers where each compressed head lives; ``compactor`` chooses and moves the survivors;
  ``cpu_backend`` attends to them.

``activate`` is the composition root: it turns settings into vLLM configuration, or refuses.
"""
