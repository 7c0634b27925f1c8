//! What the daemon must be allowed to do. See capabilities(7).

use super::{Need, Row, necessary, useful};
use std::fs;

const CAP_HINT: &str = "start the daemon with all of root's capabilities (is this a container?)";

/// Capabilities by number in the mask of /proc/self/status.
const CAPABILITIES: [(u32, Need); 13] = [
    (
        21,
        necessary(
            "CAP_SYS_ADMIN",
            "namespaces, ns_last_pid, mounts",
            "no nest can be made",
            CAP_HINT,
        ),
    ),
    (
        19,
        necessary(
            "CAP_SYS_PTRACE",
            "capturing programs",
            "no program can be captured",
            CAP_HINT,
        ),
    ),
    (
        12,
        necessary(
            "CAP_NET_ADMIN",
            "the network of a nest, frozen sockets",
            "nests have no network",
            CAP_HINT,
        ),
    ),
    (
        5,
        necessary(
            "CAP_KILL",
            "signals to programs of all users",
            "`dunlin kill` fails for users' programs",
            CAP_HINT,
        ),
    ),
    (
        6,
        necessary(
            "CAP_SETGID",
            "restoring a program's groups",
            "only root's programs can move",
            CAP_HINT,
        ),
    ),
    (
        7,
        necessary(
            "CAP_SETUID",
            "restoring a program's users",
            "only root's programs can move",
            CAP_HINT,
        ),
    ),
    (
        8,
        necessary(
            "CAP_SETPCAP",
            "restoring a program's capability sets",
            "programs with less cannot move",
            CAP_HINT,
        ),
    ),
    (
        0,
        necessary(
            "CAP_CHOWN",
            "giving a program its terminal",
            "`dunlin run` of users gets no terminal",
            CAP_HINT,
        ),
    ),
    (
        1,
        necessary(
            "CAP_DAC_OVERRIDE",
            "opening users' files for them",
            "users' programs cannot move",
            CAP_HINT,
        ),
    ),
    (
        18,
        necessary(
            "CAP_SYS_CHROOT",
            "restoring a program's root directory",
            "no nest can be entered",
            CAP_HINT,
        ),
    ),
    (
        23,
        useful(
            "CAP_SYS_NICE",
            "restoring raised priorities",
            "programs lose a raised priority",
            CAP_HINT,
        ),
    ),
    (
        14,
        useful(
            "CAP_IPC_LOCK",
            "restoring locked memory over the limit",
            "such programs cannot move here",
            CAP_HINT,
        ),
    ),
    (
        24,
        useful(
            "CAP_SYS_RESOURCE",
            "raising hard limits, and an oom_score_adj below the daemon's",
            "a program whose hard limits are above the daemon's is refused here",
            "raise the daemon's own limits, or start it with all of root's capabilities",
        ),
    ),
];

pub fn all() -> Vec<Row> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let mask = effective
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    let row = |(bit, need): &(u32, Need)| {
        need.row(if mask >> bit & 1 == 1 {
            Ok("effective".into())
        } else {
            Err("not effective".into())
        })
    };
    CAPABILITIES.iter().map(row).collect()
}
