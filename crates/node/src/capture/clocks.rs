//! The clocks of a process in a time namespace. See time_namespaces(7).

use dunlin_sys::procfs::ProcDir;

/// CLOCK_MONOTONIC and CLOCK_BOOTTIME as the process sees them.
pub fn clocks(dir: &ProcDir) -> [i64; 2] {
    use rustix::time::{ClockId, clock_gettime};
    let ours = |clock| {
        let now = clock_gettime(clock);
        now.tv_sec * 1_000_000_000 + now.tv_nsec
    };
    let [monotonic, boottime] = clock_offsets(dir);
    [ours(ClockId::Monotonic) + monotonic, ours(ClockId::Boottime) + boottime]
}

/// How far the clocks of a process are ahead of this daemon's, nanoseconds. See time_namespaces(7).
pub fn clock_offsets(dir: &ProcDir) -> [i64; 2] {
    let [monotonic, boottime] = time_offsets(&dir.text("timens_offsets").unwrap_or_default());
    let own = ProcDir::own().text("timens_offsets").unwrap_or_default();
    let [own_monotonic, own_boottime] = time_offsets(&own);
    [monotonic - own_monotonic, boottime - own_boottime]
}

/// The offsets of a time namespace, nanoseconds. See time_namespaces(7).
pub fn time_offsets(text: &str) -> [i64; 2] {
    let of = |clock: &str| {
        text.lines()
            .filter_map(|line| {
                let mut fields = line.split_ascii_whitespace();
                (fields.next()? == clock).then_some(())?;
                let seconds: i64 = fields.next()?.parse().ok()?;
                let nanos: i64 = fields.next()?.parse().ok()?;
                Some(seconds * 1_000_000_000 + nanos)
            })
            .next()
            .unwrap_or(0)
    };
    [of("monotonic"), of("boottime")]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_read() {
        let text = "monotonic          1000         5\nboottime          -7         0\n";
        assert_eq!(time_offsets(text), [1_000_000_000_005, -7_000_000_000]);
        assert_eq!(time_offsets(""), [0, 0]);
    }
}
