"""Turns AWS's notice that a spot instance will end into a drain of its Ray node.

``cluster.yaml`` runs ``python -m raypp.cluster.spot_notice --address HEAD:6379`` on every worker. Ray Train then tells
its workers, which write a checkpoint, and Ray schedules nothing more on the node.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime

METADATA = "http://169.254.169.254"  # reachable only from an instance
POLL_SECONDS = 5.0  # AWS recommends it; the notice comes two minutes ahead
TOKEN_SECONDS = 300
TIMEOUT = 2.0


def read_notice(metadata: str = METADATA) -> datetime | None:
    """The time at which this instance will end, or None.

    Source: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html

    Raises:
        OSError: the metadata service does not answer.
        ValueError: its answer is not a notice.
    """
    header = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
    token = _request(f"{metadata}/latest/api/token", "PUT", header)
    try:
        notice = _request(
            f"{metadata}/latest/meta-data/spot/instance-action", "GET", {"X-aws-ec2-metadata-token": token}
        )
    except urllib.error.HTTPError as error:
        if error.code == 404:  # no notice
            return None
        raise
    try:
        return datetime.fromisoformat(json.loads(notice)["time"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a notice: {notice!r}") from error


def _request(url: str, method: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(url, method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        text: str = response.read().decode()
        return text


def drain(address: str, end: datetime) -> None:
    """Announce to the cluster at ``address`` that the Ray node on this machine ends at ``end``.

    Raises:
        subprocess.CalledProcessError: the cluster does not accept it.
    """
    seconds = max(0, int((end - datetime.now(UTC)).total_seconds()))
    command = [
        "ray", "drain-node", f"--address={address}", "--reason=DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message=AWS ends this spot instance", f"--deadline-remaining-seconds={seconds}",
    ]  # fmt: skip
    # Without a node's ID, the command connects to Ray on this machine and drains the node that it finds.
    subprocess.run(command, env=os.environ | {"RAY_ADDRESS": address}, check=True)


def main() -> None:
    """Wait for a notice and drain the node; retry while the metadata service or the cluster does not answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True, help="of the cluster: HEAD:6379")
    parser.add_argument("--metadata", default=METADATA, help="URL of the instance's metadata service")
    parser.add_argument("--poll-seconds", type=float, default=POLL_SECONDS, help="default %(default)s")
    options = parser.parse_args()
    while True:
        try:
            if (end := read_notice(options.metadata)) is not None:
                drain(options.address, end)
                return
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        time.sleep(options.poll_seconds)


if __name__ == "__main__":
    main()
