"""Rule R2 (DESIGN §4): the one way to cross between services.

What is authoritative: the sender's `outbox` and the receiver's `inbox`, both in Postgres. JetStream only carries.

    sender                                     receiver
    ──────                                     ────────
    tx: state change + outbox row
    commit
    publish ────────── JetStream ────────────▶ tx: inbox row (already there: no effects) + effects
                                               commit
                                               ack JetStream
    delete outbox row ◀─ receipt (plain NATS) ─ receipt

A frame's life at the sender: *unconfirmed* (its row exists) → gone. At the receiver: unknown → applied | dead (its
inbox row says which). There is no third place.

What can fail, and what happens then:

| failure | what follows |
|---|---|
| sender dies before its commit | nothing happened |
| sender dies after commit, before publishing | a sweeper of any replica publishes after `republish_after` |
| JetStream loses, delays or duplicates the message | sweeper publishes again; the inbox drops what it has seen |
| receiver dies before its commit | JetStream redelivers, or the sweeper publishes again |
| receiver dies after commit, before the receipt | frame comes again, has no effects, gets the same receipt |
| receipt is lost | the same |
| frame can never be applied | `dead_frame` at the receiver, receipted as dead; `DeadFrameService` sends it anew |
| Postgres goes back in time, JetStream does not | its frames are applied; what is new counts as later (`sequence.py`) |
| frame comes back after the inbox forgot it | dead: its own id says that it is older than `inbox_retention` |

The sender's replica that committed waits for the receipt where a caller asked for APPLIED (`Sender.wait`).

Easy to get wrong: acking before the commit; republishing under the same message id (JetStream's duplicate window would
swallow it); deriving a frame's age from anything but its id; counting failures by the broker's deliveries, which count
Postgres's absences too, and begin anew with a wipe; redriving under the old id, which a late receipt may still confirm,
or under a younger one: cancels are remembered only as long as what is older than they may come.
"""
