//! An entry that is to become a process starts anew, as a surrogate whose address space and clocks are its own.
//!
//! Owns the stop of the entry and the executing of the program. Refuses to make anything of the process: that comes after.
//! Invariant: should the daemon die meanwhile, the entry is a surrogate still, or again.

use super::blank::install;
use super::{During, Kit, RestoreError};
use crate::capture::SCRIPT_MASK;
use crate::install::Wanted;
use dunlin_proto::ids::Pid;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::{Running, Stopped, TraceError};
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const SYS_EXECVEAT: i64 = 322;
const SYS_CLOSE_RANGE: i64 = 436;
const SYS_SETRESUID: i64 = 117;
const AT_EMPTY_PATH: u64 = 0x1000;
const NO_CHANGE: u64 = u32::MAX as u64;
const STOP_PATIENCE: Duration = Duration::from_secs(2);

/// Stops a surrogate where it waits for signals: elsewhere, it has taken one that it has not told of yet.
pub(super) fn stop_at_rest(mut running: Running) -> Result<Stopped, TraceError> {
    const SYS_RT_SIGTIMEDWAIT: u64 = 128;
    let deadline = Instant::now() + STOP_PATIENCE;
    loop {
        let (thread, _) = running.stop(deadline)?;
        let registers = thread.registers()?;
        if registers.orig_rax == SYS_RT_SIGTIMEDWAIT && (registers.rax as i64) < 0 {
            return Ok(thread);
        }
        running = thread.resume(0)?;
        std::thread::yield_now();
    }
}

/// Has the entry execute the surrogate program anew: the address space is its own then, its clocks can be set, and should
/// this daemon die before the loop is there, it is a surrogate again by itself. Hands `exe` back, which the entry is to
/// be given.
///
/// An entry of an ordinary user may not be given another program (PR_SET_MM_MAP of prctl(2)): it executes it, though none
/// of it runs. If this daemon dies in that moment, so does the entry, with the move.
pub(super) fn start_anew(
    pid: Pid,
    host: i32,
    thread: Stopped,
    clock_offsets_ns: [(i64, i64); 2],
    exe: OwnedFd,
    kit: &mut Kit<'_>,
) -> Result<(Stopped, Option<OwnedFd>), RestoreError> {
    /// CAP_SYS_ADMIN, CAP_CHECKPOINT_RESTORE.
    const MAY_BE_GIVEN: u64 = 1 << 21 | 1 << 40;
    let dir = ProcDir::process(host);
    let at = borrowed_syscall(pid, &dir)?;
    // Real, effective or saved root: be root again for the restore; the credentials come last.
    let (thread, _) = thread
        .inject(at, SYS_SETRESUID, [NO_CHANGE, 0, NO_CHANGE, 0, 0, 0])
        .during(pid, "regaining privilege")?;
    let (thread, _) = thread
        .inject(at, SYS_CLOSE_RANGE, [0, u64::from(u32::MAX), 0, 0, 0, 0])
        .during(pid, "closing descriptors")?;
    let thread = set_clocks(pid, &dir, thread, at, clock_offsets_ns)?;
    let effective = dir.status().during(pid, "reading its capabilities")?.capabilities[2];
    let (program, exe) = match effective & MAY_BE_GIVEN {
        0 => (exe, None),
        _ => {
            let surrogate = kit.surrogate.try_clone_to_owned();
            (surrogate.during(pid, "executing its program")?, Some(exe))
        }
    };
    let thread = install(
        pid,
        pid,
        thread,
        at,
        vec![Wanted {
            fd: program,
            number: 3,
            close_on_exec: true,
        }],
        kit,
    )?;
    let place = (thread.registers().during(pid, "reading registers")?.rsp - 1024) & !15;
    // An empty string, a name, and an argument vector of that name.
    let mut words = [0u8; 64];
    words[..8].copy_from_slice(&(place + 32).to_le_bytes());
    let comm = dir.bytes("comm").unwrap_or_default();
    let name = &comm.trim_ascii_end()[..comm.trim_ascii_end().len().min(15)];
    words[32..32 + name.len()].copy_from_slice(name);
    OpenOptions::new()
        .write(true)
        .open(dir.path("mem"))
        .and_then(|memory| memory.write_all_at(&words, place))
        .during(pid, "writing arguments")?;
    let arguments = [3, place + 16, place, 0, AT_EMPTY_PATH, 0];
    let (thread, executed) = thread
        .inject_exec(at, SYS_EXECVEAT, arguments)
        .during(pid, "executing the program")?;
    executed.during(pid, "executing the program")?;
    thread.set_signal_mask(SCRIPT_MASK).during(pid, "blocking signals")?;
    Ok((thread, exe))
}

/// Gives the blank a time namespace of its own, entered by the exec, if its clocks would not go on where the process's
/// clocks are, as far as that could be measured. See time_namespaces(7).
fn set_clocks(
    pid: Pid,
    dir: &ProcDir,
    thread: Stopped,
    at: u64,
    bounds_ns: [(i64, i64); 2],
) -> Result<Stopped, RestoreError> {
    const SYS_UNSHARE: i64 = 272;
    const CLONE_NEWTIME: u64 = 0x80;
    let now = crate::capture::clock_offsets(dir);
    let wanted_ns = [0, 1].map(|i| fitting(now[i], bounds_ns[i]));
    if now == wanted_ns {
        return Ok(thread);
    }
    let (thread, answer) = thread
        .inject(at, SYS_UNSHARE, [CLONE_NEWTIME, 0, 0, 0, 0, 0])
        .during(pid, "unshare")?;
    // An entry of an ordinary user may not; a small difference is waited for in the freeze.
    const BEARABLE_NS: i64 = 100_000_000;
    if answer < 0
        && now
            .iter()
            .zip(wanted_ns)
            .all(|(now, wanted)| (now - wanted).abs() < BEARABLE_NS)
    {
        return Ok(thread);
    }
    if answer < 0 {
        return Err(dunlin_sys::Errno(-answer as i32)).during(pid, "making a time namespace");
    }
    let [own_monotonic, own_boottime] =
        crate::capture::time_offsets(&ProcDir::own().text("timens_offsets").unwrap_or_default());
    let line = |clock: &str, ns: i64| {
        format!(
            "{clock} {} {}\n",
            ns.div_euclid(1_000_000_000),
            ns.rem_euclid(1_000_000_000)
        )
    };
    let text = line("monotonic", wanted_ns[0] + own_monotonic) + &line("boottime", wanted_ns[1] + own_boottime);
    std::fs::write(dir.path("timens_offsets"), text).during(pid, "setting its clocks")?;
    Ok(thread)
}

/// The offset a clock gets that was measured to be between `least` and `most`: the one that is there if it may be the
/// right one, so that nothing adds up over many moves; else the likeliest.
fn fitting(now: i64, (least, most): (i64, i64)) -> i64 {
    if (least..=most).contains(&now) {
        now
    } else {
        least + (most - least) / 2
    }
}

fn borrowed_syscall(pid: Pid, dir: &ProcDir) -> Result<u64, RestoreError> {
    dunlin_sys::foothold::syscall_instruction(dir).during(pid, "finding the vDSO")
}

#[cfg(test)]
mod tests {
    use super::fitting;

    #[test]
    fn a_clock_that_may_be_right_is_left_alone() {
        assert_eq!(fitting(0, (-200_000, 3_000_000)), 0);
        assert_eq!(fitting(0, (1_000, 3_000)), 2_000);
        assert_eq!(fitting(5_000, (1_000, 3_000)), 2_000);
        assert_eq!(fitting(-7, (-9, -9)), -9);
    }
}
