//! What keeps a process from moving, in words.
//!
//! Owns the wording, so that `move` and `can-move` say the same. Refuses to decide anything.

use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::Pid;
use std::fmt::Display;

/// Why a process does not move while it is in the middle of a file of the kernel; it will have read it in a moment.
pub const READING: &str = "it is being read just now, and its text goes on otherwise on the other node";

/// One obstacle.
pub fn obstacle(
    pid: Pid,
    kind: &str,
    object: impl Display,
    why: impl Into<String>,
    hint: impl Into<String>,
) -> Obstacle {
    Obstacle {
        pid,
        kind: kind.into(),
        object: object.to_string(),
        why: why.into(),
        hint: hint.into(),
    }
}

/// One obstacle about a descriptor.
pub fn descriptor(pid: Pid, number: i32, what: impl Display, why: &str, hint: &str) -> Obstacle {
    obstacle(pid, "descriptor", format_args!("fd {number} ({what})"), why, hint)
}

/// One obstacle about a mapping.
pub fn mapping(pid: Pid, range: (u64, u64), what: &[u8], why: impl Into<String>, hint: &str) -> Obstacle {
    let what = String::from_utf8_lossy(what);
    obstacle(
        pid,
        "mapping",
        format_args!("mapping {:x}-{:x} {what}", range.0, range.1),
        why,
        hint,
    )
}

/// Obstacles in one line, for a log or an error.
pub fn summary(obstacles: &[Obstacle]) -> String {
    let each: Vec<String> = obstacles.iter().map(|o| format!("{}: {}", o.object, o.why)).collect();
    each.join("; ")
}
