"""What `helm test` runs: schedules a timer through intake, and waits until the scheduler says that it has fired.

It goes the whole way: DNS, the token, intake's commit, the link through NATS, a shard with a holder, the firing. Just
after an install each of these may need a moment, so what fails is tried again. Exits with 1, and what was said last,
when the timer has not fired in time.
"""

import json
import subprocess
import sys
import time
import uuid

FIRES_WITHIN_S = 90.0
PAUSE_S = 0.5


class NotNow(Exception):
    """The command failed; the message is what it said."""


def carillon(*arguments: str) -> dict:
    """What the command answers; raises NotNow."""
    ran = subprocess.run(["carillon", *arguments, "--json"], check=False, capture_output=True, text=True)
    if ran.returncode:
        raise NotNow(f"carillon {' '.join(arguments)}: {ran.stderr.strip() or ran.stdout.strip()}")
    return json.loads(ran.stdout)


def main() -> None:
    """Try until it has fired, or the time is over."""
    began, run, timer, said = time.monotonic(), str(uuid.uuid4()), "", "nothing"
    schedule = ("schedule", f"helm-test:{run}", "--in", "2s", "--event", "carillon.helm-test", "--key", run)
    while time.monotonic() - began < FIRES_WITHIN_S:
        try:
            timer = timer or carillon(*schedule)["results"][0]["id"]
            said = carillon("timers", "get", timer)["timer"]["state"]
        except NotNow as error:
            said = str(error)
        if said == "TIMER_STATE_FIRED":
            sys.stdout.write(f"Timer {timer} was scheduled and has fired, in {time.monotonic() - began:.1f} s.\n")
            return
        time.sleep(PAUSE_S)
    sys.exit(f"The timer {timer} has not fired within {FIRES_WITHIN_S:.0f} s. The last answer: {said}")


if __name__ == "__main__":
    main()
