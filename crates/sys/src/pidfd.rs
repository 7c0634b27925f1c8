//! What a process descriptor can do beyond opening it: send a signal with its payload, tell how a process ended.
//!
//! Owns the two raw calls. Refuses to know where a descriptor came from. Invariant: a signal sent here is never
//! weaker than asked for: where the kernel refuses a payload from an outsider, it is changed to one that it takes,
//! keeping the sender and the value.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// The bytes of a `siginfo_t`.
pub const SIGINFO_BYTES: usize = 128;

const PIDFD_INFO_EXIT: u64 = 1 << 3;
/// `struct pidfd_info` as of Linux 6.15 (PIDFD_INFO_SIZE_VER1).
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    mask: u64,
    cgroupid: u64,
    pid: u32,
    tgid: u32,
    ppid: u32,
    ids: [u32; 8],
    exit_code: i32,
}

/// `_IOWR(PIDFS_IOCTL_MAGIC, 11, struct pidfd_info)`
const PIDFD_GET_INFO: libc::c_ulong =
    (3 << 30) | ((std::mem::size_of::<PidfdInfo>() as libc::c_ulong) << 16) | (0xff << 8) | 11;

/// Sends `signal`; with `info`, with that payload.
///
/// `pidfd_send_signal(2)` lets nobody but the process itself send a payload that says "from `kill`" or "from the
/// kernel" (`si_code >= 0`, or `SI_TKILL`). Such a one is sent as `SI_QUEUE` of the same sender instead. Where even
/// that is refused, the signal goes without payload.
pub fn send(pidfd: impl AsFd, signal: i32, info: Option<&[u8; SIGINFO_BYTES]>) -> io::Result<()> {
    let Some(info) = info else {
        return send_raw(&pidfd, signal, std::ptr::null());
    };
    let mut info = *info;
    info[0..4].copy_from_slice(&signal.to_ne_bytes());
    let code = i32::from_ne_bytes([info[8], info[9], info[10], info[11]]);
    if code >= 0 || code == libc::SI_TKILL {
        info[8..12].copy_from_slice(&libc::SI_QUEUE.to_ne_bytes());
        // Only SI_USER and SI_TKILL lay out pid and uid where SI_QUEUE has them; the value is then zero.
        if code == libc::SI_USER || code == libc::SI_TKILL {
            info[24..].fill(0);
        } else {
            info[12..].fill(0);
        }
    }
    match send_raw(&pidfd, signal, info.as_ptr()) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EINVAL)) => {
            send_raw(&pidfd, signal, std::ptr::null())
        }
        sent => sent,
    }
}

fn send_raw(pidfd: &impl AsFd, signal: i32, info: *const u8) -> io::Result<()> {
    // SAFETY: the kernel reads SIGINFO_BYTES bytes from `info`, which is null or points to an array of that size.
    let r = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_fd().as_raw_fd(), signal, info, 0) };
    if r == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The wait status of a process that has been reaped; `None` if it has not been, or if this kernel does not tell
/// (before Linux 6.15).
pub fn exit_status(pidfd: impl AsFd) -> io::Result<Option<i32>> {
    let mut info = PidfdInfo {
        mask: PIDFD_INFO_EXIT,
        ..PidfdInfo::default()
    };
    // SAFETY: the request carries the size of the structure, which the kernel fills at most.
    let r = unsafe { libc::ioctl(pidfd.as_fd().as_raw_fd(), PIDFD_GET_INFO, &mut info) };
    if r == 0 {
        return Ok((info.mask & PIDFD_INFO_EXIT != 0).then_some(info.exit_code));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // ESRCH: not yet reaped by anyone that would leave the information; ENOTTY and EINVAL: an older kernel.
        Some(libc::ESRCH | libc::ENOTTY | libc::EINVAL) => Ok(None),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn pidfd(pid: u32) -> std::os::fd::OwnedFd {
        let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
        rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap()
    }

    #[test]
    fn a_reaped_process_still_tells_how_it_ended() {
        let mut child = Command::new("sh").args(["-c", "exit 7"]).spawn().unwrap();
        let fd = pidfd(child.id());
        child.wait().unwrap();
        assert_eq!(exit_status(&fd).unwrap(), Some(7 << 8));
    }

    #[test]
    fn a_running_process_has_no_status_and_takes_a_signal_with_a_forbidden_code() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let fd = pidfd(child.id());
        assert_eq!(exit_status(&fd).unwrap(), None);
        let mut info = [0u8; SIGINFO_BYTES];
        info[8..12].copy_from_slice(&libc::SI_USER.to_ne_bytes());
        send(&fd, libc::SIGUSR1, Some(&info)).unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&child.wait().unwrap()),
            Some(libc::SIGUSR1)
        );
        assert_eq!(send(&fd, 0, None).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }

    #[test]
    fn the_sender_of_a_plain_kill_and_the_value_of_a_queued_one_are_kept() {
        let script = "import signal,sys\n\
            signal.pthread_sigmask(signal.SIG_BLOCK,[signal.SIGRTMIN])\n\
            print('up',flush=True)\n\
            i=signal.sigwaitinfo([signal.SIGRTMIN])\n\
            print(i.si_code,i.si_pid,i.si_uid,flush=True)";
        for (code, expected) in [
            (libc::SI_USER, "-1 1234 77"),
            (libc::SI_QUEUE, "-1 1234 77"),
            (libc::SI_MESGQ, "-3 1234 77"),
        ] {
            let mut child = Command::new("python3")
                .args(["-c", script])
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
            assert_eq!(lines.next().unwrap().unwrap(), "up");
            let mut info = [0u8; SIGINFO_BYTES];
            info[8..12].copy_from_slice(&code.to_ne_bytes());
            info[16..20].copy_from_slice(&1234i32.to_ne_bytes());
            info[20..24].copy_from_slice(&77u32.to_ne_bytes());
            send(pidfd(child.id()), libc::SIGRTMIN(), Some(&info)).unwrap();
            assert_eq!(lines.next().unwrap().unwrap(), expected);
            child.wait().unwrap();
        }
    }
}
