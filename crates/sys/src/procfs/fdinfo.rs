//! `fdinfo/N`, and the timers of `timers`.

use super::{ParseError, bad};

/// What every descriptor's fdinfo says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FdInfo {
    /// The offset of the open file description.
    pub position: u64,
    /// Its open flags, with `O_CLOEXEC` for the descriptor.
    pub flags: u32,
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
                flags: 0o2100002
            }
        );
        assert!(FdInfo::parse("flags:\t9\n").is_err());
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
