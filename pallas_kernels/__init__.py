"""GPU kernels of the decoding step, each beside the plain jnp function that defines it.

An op is a directory: `api.py` is the public function, `reference.py` its specification in jnp (and what runs on a CPU),
`kernel.py` the Pallas-Triton form, `tuned/<device>.json` the measured block sizes.
"""
