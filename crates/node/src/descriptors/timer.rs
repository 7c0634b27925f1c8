//! Timers. See timerfd_create(2).
//!
//! A timer travels as the moment at which it expires, by the clock that the program sees: however long the move takes,
//! it expires then. Expirations that nobody has read travel as a number. What the kernel does not tell is whether the
//! clock of a timer with TFD_TIMER_CANCEL_ON_SET was set since it was armed; where that shows, the timer does not move.

use super::{Found, Look};
use crate::capture::clock_offsets;
use dunlin_proto::image::{DescriptionKind, TimerFd};
use dunlin_sys::fdcalls;
use dunlin_sys::procfs::{ProcDir, special};
use rustix::fs::{OFlags, Timespec};
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, clock_gettime, timerfd_create,
    timerfd_gettime, timerfd_settime,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

const ABSOLUTE: u32 = 1;
const CANCEL_ON_SET: u32 = 2;
const NANOS: i64 = 1_000_000_000;
/// How long the kernel may take to count an expiration whose time has come.
const EXPIRES_WITHIN: Duration = Duration::from_micros(300);

/// What a timer is. `before`: as it was when it was looked at last.
pub(crate) fn look(look: &Look<'_>, before: Option<&TimerFd>) -> Found {
    let fd = look.handle()?;
    let deadline = Instant::now() + EXPIRES_WITHIN;
    loop {
        let (info, now) = ask(look, fd)?;
        let clock = clock_of(info.clock, info.flags)?;
        let offset = match is_real(info.clock, info.flags) {
            true => 0,
            false => clock_offsets(look.dir)[usize::from(clock == ClockId::Boottime)],
        };
        let timer = TimerFd {
            clock: info.clock,
            flags: info.flags,
            expires_ns: (info.remaining_ns > 0).then(|| now + info.remaining_ns as i64 + offset),
            interval_ns: info.interval_ns,
            ticks: info.ticks,
        };
        let is_over = info.remaining_ns == 0;
        if info.flags & CANCEL_ON_SET != 0 && info.interval_ns == 0 && info.ticks > 0 && !is_over {
            return look.refuse(
                "its clock was set, and the program does not know it yet (TFD_TIMER_CANCEL_ON_SET)",
                "try again when the program has read it",
            );
        }
        // Nothing left and nothing counted: it is not armed, or expires at this very moment. One that was not armed
        // before, and was not touched since, is not.
        let same = before.is_some_and(|b| TimerFd { ticks: 0, ..*b } == timer && b.ticks == 0);
        let settled = !is_over || same || (info.interval_ns == 0 && info.ticks > 0);
        let idle = is_over && before.is_none();
        if settled || idle || Instant::now() > deadline {
            return Ok(Ok(DescriptionKind::Timer(timer)));
        }
        std::hint::spin_loop();
    }
}

/// What a timer says, and the time on its clock just after. What was read between two looks at the clock that lie far apart
/// is read again: that distance is how much later the timer will come.
fn ask(look: &Look<'_>, fd: BorrowedFd<'_>) -> io::Result<(special::Timer, i64)> {
    const NEAR_NS: i64 = 10_000;
    const LOOKS: u32 = 4;
    let mut best = None;
    for _ in 0..LOOKS {
        // It is asked first: with that, the kernel counts the expirations of an interval timer.
        timerfd_gettime(fd)?;
        let before = now_ns(ClockId::Monotonic);
        let info = special::timer(&look.info()?)?;
        let now = now_ns(clock_of(info.clock, info.flags)?);
        let took = now_ns(ClockId::Monotonic) - before;
        if best.is_none_or(|(_, _, least)| took < least) {
            best = Some((info, now, took));
        }
        if took < NEAR_NS {
            break;
        }
    }
    best.map(|(info, now, _)| (info, now))
        .ok_or(io::ErrorKind::TimedOut.into())
}

/// A timer for a process with the given number on this machine, by whose clocks it is told.
pub(crate) fn make(timer: &TimerFd, host: i32, flags: OFlags) -> io::Result<OwnedFd> {
    let clock = match timer.clock {
        0 => TimerfdClockId::Realtime,
        1 => TimerfdClockId::Monotonic,
        7 => TimerfdClockId::Boottime,
        8 => TimerfdClockId::RealtimeAlarm,
        9 => TimerfdClockId::BoottimeAlarm,
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    let mut how = TimerfdFlags::CLOEXEC;
    how.set(TimerfdFlags::NONBLOCK, flags.contains(OFlags::NONBLOCK));
    let fd = timerfd_create(clock, how)?;
    set(&fd, timer, host)?;
    Ok(fd)
}

/// Makes a timer of the same clock what it is to be.
pub(crate) fn set(fd: &OwnedFd, timer: &TimerFd, host: i32) -> io::Result<()> {
    const TRIES: u32 = 16;
    let clock = clock_of(timer.clock, timer.flags)?;
    let offsets = clock_offsets(&ProcDir::process(host));
    let offset = match is_real(timer.clock, timer.flags) {
        true => 0,
        false => offsets[usize::from(clock == ClockId::Boottime)],
    };
    let mut timer = *timer;
    timer.expires_ns = timer.expires_ns.map(|expires_ns| expires_ns - offset);
    for _ in 0..TRIES {
        count_passed(&mut timer, now_ns(clock));
        arm(fd, &timer, clock)?;
        if timer.ticks == 0 {
            return Ok(());
        }
        fdcalls::set_ticks(fd.as_fd(), timer.ticks)?;
        // What expired between these two calls would not be counted.
        if timer.expires_ns.is_none_or(|expires_ns| now_ns(clock) < expires_ns) {
            return Ok(());
        }
    }
    Err(io::Error::other("it expires faster than it can be set"))
}

/// Of a timer that has ticks already, and whose time has come again meanwhile, those are counted as well.
fn count_passed(timer: &mut TimerFd, now: i64) {
    let Some(expires_ns) = timer.expires_ns.as_mut().filter(|e| timer.ticks > 0 && **e <= now) else {
        return;
    };
    if timer.interval_ns == 0 {
        (timer.ticks, timer.expires_ns) = (timer.ticks + 1, None);
        return;
    }
    let passed = (now - *expires_ns) as u64 / timer.interval_ns + 1;
    timer.ticks += passed;
    *expires_ns += (passed * timer.interval_ns) as i64;
}

/// `timer.expires_ns` is by this process's own clock.
fn arm(fd: &OwnedFd, timer: &TimerFd, clock: ClockId) -> io::Result<()> {
    let value = timer.expires_ns.map(|expires_ns| match timer.flags & ABSOLUTE {
        0 => expires_ns - now_ns(clock),
        _ => expires_ns,
    });
    let spec = Itimerspec {
        it_interval: timespec(timer.interval_ns as i64),
        // Zero would mean never.
        it_value: timespec(value.map_or(0, |value| value.max(1))),
    };
    timerfd_settime(fd, TimerfdTimerFlags::from_bits_retain(timer.flags), &spec)?;
    Ok(())
}

/// Whether it expires by the time of day.
fn is_real(clock: i32, flags: u32) -> bool {
    clock == 8 || (clock == 0 && flags & ABSOLUTE != 0)
}

/// The clock by which its expiration is told.
fn clock_of(clock: i32, flags: u32) -> io::Result<ClockId> {
    match clock {
        0 if flags & ABSOLUTE == 0 => Ok(ClockId::Monotonic),
        0 | 8 => Ok(ClockId::Realtime),
        1 => Ok(ClockId::Monotonic),
        7 | 9 => Ok(ClockId::Boottime),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a timer of clock {clock}"),
        )),
    }
}

fn now_ns(clock: ClockId) -> i64 {
    let now = clock_gettime(clock);
    now.tv_sec * NANOS + now.tv_nsec
}

fn timespec(ns: i64) -> Timespec {
    Timespec {
        tv_sec: ns / NANOS,
        tv_nsec: ns % NANOS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    fn info(fd: &OwnedFd) -> special::Timer {
        let own = ProcDir::own();
        special::timer(&own.text(&format!("fdinfo/{}", fd.as_raw_fd())).unwrap()).unwrap()
    }

    #[test]
    fn a_timer_is_armed_for_the_moment_and_keeps_its_ticks() {
        let host = std::process::id() as i32;
        for (clock, flags) in [
            (1, 0),
            (1, ABSOLUTE),
            (7, ABSOLUTE),
            (0, 0),
            (0, ABSOLUTE | CANCEL_ON_SET),
        ] {
            let now = now_ns(clock_of(clock, flags).unwrap());
            let timer = TimerFd {
                clock,
                flags,
                expires_ns: Some(now + 3_600 * NANOS),
                interval_ns: 77,
                ticks: 5,
            };
            let fd = make(&timer, host, OFlags::NONBLOCK).unwrap();
            let found = info(&fd);
            assert_eq!(
                (found.clock, found.flags, found.interval_ns, found.ticks),
                (clock, flags, 77, 5)
            );
            assert!(found.remaining_ns > 3_590 * NANOS as u64 && found.remaining_ns <= 3_600 * NANOS as u64);
        }
    }

    #[test]
    fn what_has_passed_meanwhile_is_counted() {
        let mut timer = TimerFd {
            clock: 1,
            flags: 0,
            expires_ns: Some(100),
            interval_ns: 10,
            ticks: 2,
        };
        count_passed(&mut timer, 125);
        assert_eq!((timer.ticks, timer.expires_ns), (5, Some(130)));
        count_passed(&mut timer, 129);
        assert_eq!((timer.ticks, timer.expires_ns), (5, Some(130)));
        timer.interval_ns = 0;
        count_passed(&mut timer, 130);
        assert_eq!((timer.ticks, timer.expires_ns), (6, None));
    }
}
