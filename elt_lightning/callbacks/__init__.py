"""Lightning callbacks: averaged weights, metrics per loop count, throughput, progress without a terminal."""
