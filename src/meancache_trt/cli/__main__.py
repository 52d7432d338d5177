"""`python -m meancache_trt.cli`."""

from meancache_trt.cli import main

main()
