//! `stat`: the numbers that nothing else shows.

use super::{ParseError, bad};

/// What dunlin needs of `stat`, by the names of proc(5).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stat {
    /// The command name, at most 15 bytes.
    pub comm: Vec<u8>,
    /// R, S, D, T, t, Z, X, I.
    pub state: char,
    /// Parent, in the reader's namespace.
    pub ppid: i32,
    /// Process group.
    pub pgrp: i32,
    /// Session.
    pub session: i32,
    /// Controlling terminal's device number.
    pub tty_nr: i32,
    /// Kernel flags.
    pub flags: u64,
    /// Nice value.
    pub nice: i32,
    /// Threads.
    pub threads: u32,
    /// Clock ticks after boot at which it started.
    pub start_time: u64,
    /// Resident pages.
    pub rss_pages: u64,
    /// The signal that its parent gets at its end; 0 if none, and wait(2) shows it to nobody who does not ask for clones.
    pub exit_signal: i32,
    /// CPU it last ran on.
    pub processor: u32,
    /// Code, data, heap, stack, arguments and environment of the address space (0 where not permitted).
    pub layout: Layout,
    /// The status its parent would see.
    pub exit_code: i32,
}

/// Where the parts of an address space are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)] // the names of proc(5) and prctl(2) say all there is
pub struct Layout {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
}

impl Stat {
    /// Parses a whole `stat`.
    pub fn parse(text: &[u8]) -> Result<Stat, ParseError> {
        Stat::fields(text).ok_or_else(|| bad("stat", &String::from_utf8_lossy(text)))
    }

    fn fields(text: &[u8]) -> Option<Stat> {
        // The name may hold spaces and parentheses: it ends at the last one.
        let open = text.iter().position(|b| *b == b'(')?;
        let close = text.iter().rposition(|b| *b == b')')?;
        let comm = text.get(open + 1..close)?.to_vec();
        let rest = std::str::from_utf8(text.get(close + 1..)?).ok()?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        // proc(5) counts from 1 and the name is its second.
        let at = |n: usize| fields.get(n - 3).copied();
        let number = |n: usize| at(n)?.parse::<u64>().ok();
        let signed = |n: usize| at(n)?.parse::<i32>().ok();
        Some(Stat {
            comm,
            state: at(3)?.chars().next()?,
            ppid: signed(4)?,
            pgrp: signed(5)?,
            session: signed(6)?,
            tty_nr: signed(7)?,
            flags: number(9)?,
            nice: signed(19)?,
            threads: number(20)? as u32,
            start_time: number(22)?,
            rss_pages: number(24)?,
            exit_signal: signed(38)?,
            processor: number(39)? as u32,
            layout: Layout {
                start_code: number(26)?,
                end_code: number(27)?,
                start_stack: number(28)?,
                start_data: number(45)?,
                end_data: number(46)?,
                start_brk: number(47)?,
                arg_start: number(48)?,
                arg_end: number(49)?,
                env_start: number(50)?,
                env_end: number(51)?,
            },
            exit_code: signed(52)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses() {
        let mut text = b"7 (a) b (c) S 1 7 7 0 -1 4194304".to_vec();
        for n in 10..=52 {
            text.extend(format!(" {n}").bytes());
        }
        let stat = Stat::parse(&text).unwrap();
        assert_eq!(stat.comm, b"a) b (c");
        assert_eq!((stat.state, stat.ppid, stat.nice, stat.start_time), ('S', 1, 19, 22));
        assert_eq!(
            (stat.layout.start_code, stat.layout.env_end, stat.exit_code),
            (26, 51, 52)
        );
    }

    #[test]
    fn own_stat_parses() {
        let stat = Stat::parse(&std::fs::read("/proc/self/stat").unwrap()).unwrap();
        assert!(stat.layout.start_stack != 0);
    }
}
