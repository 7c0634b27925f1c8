//! `fdinfo/N`, and the timers of `timers`.

use super::{ParseError, bad};

/// What every descriptor's fdinfo says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FdInfo {
    /// The offset of the open file description.
    pub position: u64,
    /// Its open flags, with `O_CLOEXEC` for the descriptor.
    pub flags: u32,
    /// The locks that the process made through it, and the description's own.
    pub locks: Vec<Lock>,
}

/// A line `lock:` of fdinfo; its fields are those of `/proc/locks` (proc_locks(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lock {
    /// What kind it is of.
    pub kind: LockKind,
    /// Exclusive.
    pub write: bool,
    /// Its first byte.
    pub start: u64,
    /// Its last byte; `None` for the end of the file, wherever that comes to be.
    pub last: Option<u64>,
}

/// The kinds of locks that the kernel tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockKind {
    /// fcntl(2), F_SETLK: the process's.
    Posix,
    /// fcntl(2), F_OFD_SETLK: the open file description's.
    OpenFile,
    /// flock(2).
    Flock,
    /// F_SETLEASE, or a delegation of a file server.
    Lease,
}

impl Lock {
    /// What follows `lock:`, such as `1: POSIX  ADVISORY  WRITE 1234 fe:00:77 0 EOF`.
    fn parse(text: &str) -> Option<Lock> {
        let mut words = text.split_ascii_whitespace().skip(1);
        let kind = match words.next()? {
            "POSIX" => LockKind::Posix,
            "OFDLCK" => LockKind::OpenFile,
            "FLOCK" => LockKind::Flock,
            "LEASE" | "DELEG" => LockKind::Lease,
            _ => return None,
        };
        let write = words.nth(1)? == "WRITE";
        let start = words.nth(2)?.parse().ok()?;
        let last = match words.next()? {
            "EOF" => None,
            last => Some(last.parse().ok()?),
        };
        Some(Lock {
            kind,
            write,
            start,
            last,
        })
    }
}

impl FdInfo {
    /// Parses a whole fdinfo; lines of special descriptors are passed over.
    pub fn parse(text: &str) -> Result<FdInfo, ParseError> {
        let mut info = FdInfo::default();
        for line in text.lines() {
            if let Some(value) = line.strip_prefix("pos:") {
                // A negative offset is possible on /dev/mem and its like only; keep its bits.
                info.position = value.trim().parse::<i64>().map_err(|_| bad("fdinfo", line))? as u64;
            } else if let Some(value) = line.strip_prefix("flags:") {
                info.flags = u32::from_str_radix(value.trim(), 8).map_err(|_| bad("fdinfo", line))?;
            } else if let Some(value) = line.strip_prefix("lock:") {
                info.locks.push(Lock::parse(value).ok_or_else(|| bad("fdinfo", line))?);
            }
        }
        Ok(info)
    }
}

/// One POSIX timer, as `timers` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PosixTimer {
    /// Its number in the process.
    pub id: i32,
    /// The signal it sends.
    pub signal: i32,
    /// The value that comes with it.
    pub value: u64,
    /// `SIGEV_SIGNAL` 0, `SIGEV_NONE` 1, `SIGEV_THREAD_ID` 4.
    pub notify: i32,
    /// The thread for `SIGEV_THREAD_ID`, in the reader's namespace.
    pub target: i32,
    /// Its clock.
    pub clock: i32,
}

/// Parses a whole `timers`.
pub fn parse_timers(text: &str) -> Result<Vec<PosixTimer>, ParseError> {
    let mut timers: Vec<PosixTimer> = Vec::new();
    for line in text.lines() {
        let (key, value) = line.split_once(':').ok_or_else(|| bad("timers", line))?;
        let value = value.trim();
        parse_timer_line(&mut timers, key, value).ok_or_else(|| bad("timers", line))?;
    }
    Ok(timers)
}

fn parse_timer_line(timers: &mut Vec<PosixTimer>, key: &str, value: &str) -> Option<()> {
    match key {
        "ID" => timers.push(PosixTimer {
            id: value.parse().ok()?,
            signal: 0,
            value: 0,
            notify: 0,
            target: 0,
            clock: 0,
        }),
        "signal" => {
            let (signal, payload) = value.split_once('/')?;
            let timer = timers.last_mut()?;
            timer.signal = signal.parse().ok()?;
            timer.value = u64::from_str_radix(payload.trim_start_matches("0x"), 16).ok()?;
        }
        "notify" => {
            let (kind, target) = value.split_once('/')?;
            let timer = timers.last_mut()?;
            timer.notify = match kind {
                "signal" => 0,
                "none" => 1,
                "thread" => 2,
                _ => return None,
            };
            let (which, number) = target.split_once('.')?;
            timer.target = number.parse().ok()?;
            if which == "tid" {
                timer.notify |= 4;
            }
        }
        "ClockID" => timers.last_mut()?.clock = value.parse().ok()?,
        _ => {}
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_and_flags() {
        let info = FdInfo::parse("pos:\t42\nflags:\t02100002\nmnt_id:\t24\nino:\t7\n").unwrap();
        assert_eq!(
            info,
            FdInfo {
                position: 42,
                flags: 0o2100002,
                locks: Vec::new(),
            }
        );
        assert!(FdInfo::parse("flags:\t9\n").is_err());
    }

    #[test]
    fn locks_of_every_kind() {
        let text = "lock:\t1: POSIX  ADVISORY  WRITE 1234 fe:00:77 1073741824 1073741825\n\
                    lock:\t2: OFDLCK ADVISORY  READ  -1 fe:00:77 0 EOF\n\
                    lock:\t3: FLOCK  ADVISORY  WRITE 1234 fe:00:77 0 EOF\n\
                    lock:\t4: LEASE  ACTIVE    READ  1234 fe:00:77 0 EOF\n";
        let locks = FdInfo::parse(text).unwrap().locks;
        let kinds: Vec<_> = locks.iter().map(|l| (l.kind, l.write)).collect();
        let expected = [
            (LockKind::Posix, true),
            (LockKind::OpenFile, false),
            (LockKind::Flock, true),
            (LockKind::Lease, false),
        ];
        assert_eq!(kinds, expected);
        assert_eq!((locks[0].start, locks[0].last), (1_073_741_824, Some(1_073_741_825)));
        assert!(FdInfo::parse("lock:\t1: POSIX\n").is_err());
    }

    #[test]
    fn timers_of_both_kinds() {
        let text = "ID: 1\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n\
                    ID: 0\nsignal: 14/0000000000000001\nnotify: signal/tid.2635\nClockID: 1\n";
        let timers = parse_timers(text).unwrap();
        assert_eq!(timers[0].value, 0x7fff86e452a8);
        assert_eq!((timers[1].notify, timers[1].target, timers[1].clock), (4, 2635, 1));
    }
}
