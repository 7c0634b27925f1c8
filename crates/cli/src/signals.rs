//! The names of signals, as people write them.
//!
//! Owns the table (x86-64 Linux). Refuses to send any.

/// Names without `SIG`, by number, from 1.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM",
    "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO",
    "PWR", "SYS",
];
/// The first and last real-time signal a program can use: the C library keeps 32 and 33.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// A signal from `TERM`, `SIGTERM`, `15`, `RTMIN+2` or `0` (which only asks whether the process is there).
pub fn parse(text: &str) -> Result<i32, String> {
    if let Ok(number) = text.parse::<i32>() {
        return match number {
            0..=RTMAX => Ok(number),
            _ => Err(format!("there is no signal {number}; they go up to {RTMAX}")),
        };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let aliases = [("IOT", 6), ("CLD", 17), ("POLL", 29)];
    if let Some((_, number)) = aliases.iter().find(|(alias, _)| *alias == name) {
        return Ok(*number);
    }
    if let Some(index) = NAMES.iter().position(|n| *n == name) {
        return Ok(index as i32 + 1);
    }
    real_time(name).ok_or_else(|| format!("there is no signal {text:?}; try TERM, KILL, STOP, CONT, USR1 or a number"))
}

fn real_time(name: &str) -> Option<i32> {
    let offset = |text: &str, sign: char| match text {
        "" => Some(0),
        text => text.strip_prefix(sign)?.parse::<i32>().ok().filter(|n| *n >= 0),
    };
    let number = match name.strip_prefix("RTMIN") {
        Some(rest) => RTMIN.checked_add(offset(rest, '+')?)?,
        None => RTMAX.checked_sub(offset(name.strip_prefix("RTMAX")?, '-')?)?,
    };
    (RTMIN..=RTMAX).contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_write_a_signal() {
        for (text, number) in [
            ("TERM", 15),
            ("SIGTERM", 15),
            ("sigterm", 15),
            ("15", 15),
            ("0", 0),
            ("kill", 9),
            ("USR1", 10),
            ("WINCH", 28),
            ("SYS", 31),
            ("CHLD", 17),
            ("CLD", 17),
            ("RTMIN", 34),
            ("SIGRTMIN+2", 36),
            ("RTMAX-1", 63),
        ] {
            assert_eq!(parse(text), Ok(number), "{text}");
        }
        for bad in [
            "",
            "SIG",
            "TERMINATE",
            "-1",
            "65",
            "RTMIN+31",
            "RTMAX-31",
            "RTMIN-1",
            "RTMIN+x",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
