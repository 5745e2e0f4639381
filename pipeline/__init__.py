"""Training of a DCGAN: from photographs on disk to checkpoints, pictures and a report."""

import os

# How long an idle thread of libgomp spins before it sleeps; read when torch is first imported.  The default, some
# milliseconds, is ruin where anything else wants a core: beside one busy process a step on 2 cores fell from 550 to
# between 10 and 150 images/s.  With 100,000 turns it holds 470 to 490 there, and loses nothing alone (2026-11).
os.environ.setdefault("GOMP_SPINCOUNT", "100000")
