"""The tools of the demo's ops agent: names, argument values, and the ways people ask for each.

Every value is a plain word or number without spaces, so that a request names it exactly as the call repeats it.
"""

from typing import NamedTuple

VALUES: dict[str, tuple[str, ...]] = {
    "service": ("accounts", "billing", "checkout", "gateway", "inventory", "login", "mail", "search"),
    "environment": ("live", "staging", "test"),
    "region": ("africa", "america", "asia", "europe"),
    "host": ("atlas", "comet", "delta", "falcon", "harbor", "nova", "orion", "titan"),
    "metric": ("cpu", "disk", "errors", "latency", "memory"),
    "severity": ("critical", "high", "low"),
    "team": ("data", "network", "security", "storage"),
    "flag": ("banner", "beta", "export", "preview", "signup"),
    "state": ("off", "on"),
    "database": ("archive", "customers", "events", "ledger", "tickets"),
    "secret": ("certificate", "password", "token"),
    "count": ("2", "3", "4", "5", "6", "8"),
    "lines": ("50", "100", "200", "500"),
    "duration": ("5m", "10m", "30m", "1h", "4h"),
}  # fmt: skip
"""Closed vocabularies: kind of value -> its values."""


class Tool(NamedTuple):
    """A tool of the ops agent."""

    name: str
    """Name in the call."""
    arguments: dict[str, str]
    """Argument in the order of the call -> key of ``VALUES``."""
    phrasings: tuple[str, ...]
    """Imperative requests in lower case with every argument in braces."""


TOOLS: tuple[Tool, ...] = (
    Tool("restart_service", {"service": "service", "environment": "environment"}, (
        "restart {service} in {environment}",
        "restart the {service} service in {environment}",
        "bounce {service} on {environment}",
        "give {service} in {environment} a restart",
        "stop and start {service} in the {environment} environment",
        "bring {service} back up in {environment}",
    )),
    Tool("scale_deployment", {"service": "service", "replicas": "count", "environment": "environment"}, (
        "scale {service} to {replicas} replicas in {environment}",
        "scale {service} in {environment} to {replicas}",
        "run {replicas} copies of {service} in {environment}",
        "set the replicas of {service} in {environment} to {replicas}",
        "resize {service} on {environment} to {replicas} pods",
        "make it {replicas} replicas for {service} in {environment}",
    )),
    Tool("rollback_release", {"service": "service", "version": "count", "environment": "environment"}, (
        "roll {service} in {environment} back to version {version}",
        "roll back {service} to release {version} in {environment}",
        "revert {service} on {environment} to version {version}",
        "put version {version} of {service} back on {environment}",
        "undo the release of {service} in {environment}, go back to {version}",
        "return {service} in {environment} to release {version}",
    )),
    Tool("tail_logs", {"service": "service", "lines": "lines", "environment": "environment"}, (
        "show the last {lines} log lines of {service} in {environment}",
        "tail {lines} lines of the {service} logs in {environment}",
        "print {lines} lines of logs from {service} on {environment}",
        "get me the newest {lines} log lines for {service} in {environment}",
        "read the {service} log in {environment}, {lines} lines",
        "fetch {lines} lines from the log of {service} on {environment}",
    )),
    Tool("query_metric", {"metric": "metric", "service": "service", "window": "duration"}, (
        "show the {metric} of {service} over the last {window}",
        "graph {metric} for {service}, last {window}",
        "check {metric} on {service} for the past {window}",
        "tell me how {service} did on {metric} during the last {window}",
        "pull {metric} numbers for {service} from the past {window}",
        "plot {window} of {metric} for {service}",
    )),
    Tool("open_incident", {"service": "service", "severity": "severity"}, (
        "open a {severity} incident for {service}",
        "file an incident on {service}, severity {severity}",
        "start a {severity} severity incident about {service}",
        "declare an incident for {service} with {severity} severity",
        "create a {severity} incident ticket for {service}",
        "report {service} as a {severity} incident",
    )),
    Tool("silence_alert", {"metric": "metric", "service": "service", "duration": "duration"}, (
        "silence the {metric} alert of {service} for {duration}",
        "mute {metric} alerts on {service} for {duration}",
        "snooze the {service} {metric} alert for {duration}",
        "keep the {metric} alarm of {service} quiet for {duration}",
        "pause {metric} alerting for {service}, {duration}",
        "stop alerting on {metric} for {service} for {duration}",
    )),
    Tool("drain_node", {"host": "host", "region": "region"}, (
        "drain {host} in {region}",
        "drain the node {host} in the {region} region",
        "move everything off {host} in {region}",
        "empty node {host} in {region}",
        "take the {region} node {host} out of rotation",
        "evict all pods from {host} in {region}",
    )),
    Tool("reboot_host", {"host": "host", "region": "region"}, (
        "reboot {host} in {region}",
        "reboot the host {host} in {region}",
        "power cycle {host} in the {region} region",
        "restart the machine {host} in {region}",
        "reset the {region} host {host}",
        "turn {host} in {region} off and on again",
    )),
    Tool("rotate_secret", {"secret": "secret", "service": "service", "environment": "environment"}, (
        "rotate the {secret} of {service} in {environment}",
        "renew the {service} {secret} on {environment}",
        "replace the {secret} for {service} in {environment}",
        "issue a new {secret} for {service} in {environment}",
        "change the {secret} that {service} uses in {environment}",
        "swap out the {environment} {secret} of {service}",
    )),
    Tool("run_backup", {"database": "database", "region": "region"}, (
        "back up {database} in {region}",
        "run a backup of the {database} database in {region}",
        "take a snapshot of {database} in {region}",
        "save a copy of the {database} database in {region}",
        "start the {region} backup of {database}",
        "make a backup of {database} for {region}",
    )),
    Tool("restore_backup", {"database": "database", "region": "region", "age": "duration"}, (
        "restore {database} in {region} from the backup {age} ago",
        "bring back the {database} database in {region} as of {age} ago",
        "load the {age} old backup of {database} in {region}",
        "recover {database} in {region} from {age} ago",
        "put the {region} copy of {database} back to {age} ago",
        "rewind {database} in {region} by {age}",
    )),
    Tool("purge_cache", {"service": "service", "region": "region"}, (
        "purge the {service} cache in {region}",
        "clear the cache of {service} in {region}",
        "flush cached data for {service} in {region}",
        "wipe the {region} cache of {service}",
        "drop all cached pages of {service} in {region}",
        "invalidate the cache for {service} in {region}",
    )),
    Tool("set_flag", {"flag": "flag", "state": "state", "environment": "environment"}, (
        "turn {state} the {flag} flag in {environment}",
        "set {flag} to {state} in {environment}",
        "switch the {flag} feature {state} in {environment}",
        "switch {state} {flag} on the {environment} environment",
        "flip the flag {flag} to {state} in {environment}",
        "the {flag} flag should be {state} in {environment}, set it",
    )),
    Tool("page_oncall", {"team": "team", "severity": "severity", "service": "service"}, (
        "page the {team} team about {service}, {severity} severity",
        "call the {team} on call for {service} with {severity} severity",
        "wake up {team}, {service} has a {severity} problem",
        "send a {severity} page to the {team} team for {service}",
        "notify {team} on call of a {severity} problem with {service}",
        "get someone from {team} to look at {service}, {severity} severity",
    )),
)  # fmt: skip
"""Tools in a fixed order; the generator depends on it."""

OPENERS: tuple[str, ...] = (
    "", "", "please ", "can you ", "could you ", "could you please ", "I need you to ", "we have to ", "time to ",
    "hey, ",
)  # fmt: skip
"""Words before a request; an empty one leaves it bare."""

CLOSERS: tuple[str, ...] = ("", "", ".", " now", " please", " right away", " for me", ", thanks")
"""Words after a request."""
