"""Deterministic simulation of the scheduler: many replicas, one thread, no real time. One seed is one history.

    python -m tests.simulation --seeds 1000          look for a history that breaks an invariant
    python -m tests.simulation --seed 4711           one history again, byte for byte

**What is real**: the engine, the leases loop, the mailbox, the shards with wheel, conditions and recurrences, the frame
codec, and both halves of the link (Sender, Settlement, Receiver). **What is not**: time (`loop`), Postgres (`postgres`,
`stores`, `links`), NATS (`broker`), and the machines (`loop.Process`). The fakes pass the same contract suite as what
they stand for (tests/contract).

**How a history is made.** `plan` draws from the seed what callers ask for and what goes wrong, as a list of timed
actions. `world` runs it: replicas, an intake that sends, a digest that receives. Every message between a process and a
server takes its own time, drawn from the seed, so that each seed is another interleaving. A process can die or stand
still between any two steps of any of its tasks, while what it had asked for takes effect all the same. After the
faults everything gets time to settle.

**How it is judged.** The fake Postgres keeps every commit: who wrote what, when. `checker` reads that and what callers
and receivers saw, never what the code under test says of itself. `shrink` makes a failing plan short. `defects` plants
bugs one at a time; test_checker_bites proves that each is found.

The method is FoundationDB's (Zhou et al., SIGMOD 2021, §4) and TigerBeetle's (VOPR), as far as it is needed here.
"""
