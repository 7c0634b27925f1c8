//! `fdinfo/N` of descriptors that are no files: what epoll, eventfd, timerfd and signalfd say of themselves.
//!
//! See proc(5) and Documentation/filesystems/proc.rst of the kernel.

use super::{ParseError, bad};

/// One line `tfd:` of an epoll descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watch {
    /// The number under which the file was added; by now it may be another file's.
    pub number: i32,
    /// What is asked for, with EPOLLET, EPOLLONESHOT and the like.
    pub events: u32,
    /// What comes with an event.
    pub data: u64,
    /// The file's inode.
    pub inode: u64,
}

/// What an epoll descriptor watches, in the kernel's order: entries with one number stand in the order of
/// KCMP_EPOLL_TFD's offsets.
pub fn watches(text: &str) -> Result<Vec<Watch>, ParseError> {
    let of = |line: &str| {
        // `events: 19` and `pos:0` alike.
        let spaced = line.replace(':', ": ");
        let mut words = spaced.split_ascii_whitespace();
        let number = words.next()?.parse().ok()?;
        let mut hex = |key: &str| {
            words.find(|word| *word == key)?;
            u64::from_str_radix(words.next()?, 16).ok()
        };
        Some(Watch {
            number,
            events: u32::try_from(hex("events:")?).ok()?,
            data: hex("data:")?,
            inode: hex("ino:")?,
        })
    };
    let lines = text.lines().filter_map(|line| line.strip_prefix("tfd:"));
    lines.map(|line| of(line).ok_or_else(|| bad("fdinfo", line))).collect()
}

/// An eventfd: its count, and whether it is a semaphore.
pub fn event(text: &str) -> Result<(u64, bool), ParseError> {
    let count = value(text, "eventfd-count:").and_then(|v| u64::from_str_radix(v, 16).ok());
    let count = count.ok_or_else(|| bad("fdinfo", text))?;
    Ok((count, value(text, "eventfd-semaphore:") == Some("1")))
}

/// A timerfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timer {
    /// Its clock.
    pub clock: i32,
    /// Expirations that nobody has read.
    pub ticks: u64,
    /// TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET, as it was set last.
    pub flags: u32,
    /// Until the next expiration, nanoseconds; 0: not armed, or about to expire.
    pub remaining_ns: u64,
    /// From then on, nanoseconds.
    pub interval_ns: u64,
}

/// A timerfd as it is. Expirations of an interval timer that nobody has asked for since are not counted yet.
pub fn timer(text: &str) -> Result<Timer, ParseError> {
    let time = |key: &str| {
        let (seconds, nanos) = value(text, key)?
            .strip_prefix('(')?
            .strip_suffix(')')?
            .split_once(", ")?;
        let seconds: u64 = seconds.parse().ok()?;
        seconds.checked_mul(1_000_000_000)?.checked_add(nanos.parse().ok()?)
    };
    let read = || {
        Some(Timer {
            clock: value(text, "clockid:")?.parse().ok()?,
            ticks: value(text, "ticks:")?.parse().ok()?,
            flags: u32::from_str_radix(value(text, "settime flags:")?, 8).ok()?,
            remaining_ns: time("it_value:")?,
            interval_ns: time("it_interval:")?,
        })
    };
    read().ok_or_else(|| bad("fdinfo", text))
}

/// The signals of a signalfd: signal N is bit N − 1.
pub fn signal_mask(text: &str) -> Result<u64, ParseError> {
    let mask = value(text, "sigmask:").and_then(|v| u64::from_str_radix(v, 16).ok());
    mask.ok_or_else(|| bad("fdinfo", text))
}

/// The value behind a key, of which there is one line.
pub fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(key)).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watches_are_read() {
        let text = "pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t1040\n\
                    tfd:        5 events:       1d data: ffffffffffffffff  pos:0 ino:61af sdev:7\n\
                    tfd:        5 events: c0000019 data:                7  pos:0 ino:10 sdev:e\n";
        let all = watches(text).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!(
            all[0],
            Watch {
                number: 5,
                events: 0x1d,
                data: u64::MAX,
                inode: 0x61af
            }
        );
        assert_eq!((all[1].events, all[1].data, all[1].inode), (0xc000_0019, 7, 0x10));
        assert!(watches("tfd: 5 events: what\n").is_err());
    }

    #[test]
    fn an_event_counter_is_read() {
        let info = "pos:\t0\nflags:\t02\neventfd-count:               1f\neventfd-id: 3\neventfd-semaphore: 1\n";
        assert_eq!(event(info).unwrap(), (0x1f, true));
        assert!(event("pos:\t0\n").is_err());
    }

    #[test]
    fn timers_and_masks_are_read() {
        let text = "clockid: 1\nticks: 3\nsettime flags: 01\nit_value: (0, 49406829)\nit_interval: (1, 5)\n";
        let timer = timer(text).unwrap();
        assert_eq!((timer.clock, timer.ticks, timer.flags), (1, 3, 1));
        assert_eq!((timer.remaining_ns, timer.interval_ns), (49_406_829, 1_000_000_005));
        assert_eq!(signal_mask("sigmask:\t0000000000000006\n").unwrap(), 6);
    }
}
