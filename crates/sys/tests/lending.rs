//! A child that lends the memory it shares.

use dunlin_sys::foothold::Foothold;
use dunlin_sys::lending::Lender;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::{Options, Running};
use dunlin_sys::script::{PAGE, Script};
use dunlin_sys::vmcopy::{self, Span};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const CLONE_VM: u64 = 0x100;
const AF_UNIX: u64 = 1;
const SOCK_SEQPACKET: u64 = 5;
const READ_WRITE: u64 = 3;
const PRIVATE_ANONYMOUS: u64 = 0x22;
const PAGES: u64 = 256;

/// Ends what it names when it goes.
struct Target(Child, Option<i32>);

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(child) = self.1.and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(child, rustix::process::Signal::KILL);
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn pages_are_lent_in_any_order_and_what_cannot_be_lent_is_told() {
    let mut target = Target(
        Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap(),
        None,
    );
    let pid = target.0.id() as i32;
    let dir = ProcDir::process(pid);
    while dir.text("comm").unwrap().trim() != "sleep" || dir.status().unwrap().state != 'S' {}
    let soon = Instant::now() + Duration::from_secs(10);
    let (thread, _) = Running::seize(pid, Options::default()).unwrap().stop(soon).unwrap();
    thread.set_signal_mask(!(1 << (libc::SIGTRAP - 1))).unwrap();
    let (thread, foothold) = Foothold::plant(thread, pid, &[]).unwrap();
    let mut script = Script::new(&foothold.arena);
    let memory = [0, PAGES * PAGE, READ_WRITE, PRIVATE_ANONYMOUS, u64::MAX, 0];
    let memory = script.call("mmap", libc::SYS_mmap, &memory);
    script.call("close_range", libc::SYS_close_range, &[0, u64::from(u32::MAX), 0]);
    let ends = [script.space(8), script.space(8)].map(|space| space.address);
    script.call(
        "socketpair",
        libc::SYS_socketpair,
        &[AF_UNIX, SOCK_SEQPACKET, 0, ends[0]],
    );
    script.call("pipe2", libc::SYS_pipe2, &[ends[1], 0]);
    let child = script.child_lends("clone", libc::SYS_clone, &[CLONE_VM, 0, 0, 0, 0]);
    let (_thread, answers) = script.run(thread).unwrap();
    let (base, child) = (answers.of(memory) as u64, answers.of(child) as i32);
    target.1 = Some(child);
    let content = |page: u64| [page as u8 ^ (page >> 3) as u8; PAGE as usize];
    let mem = vmcopy::open_mem_writable(pid).unwrap();
    for page in 0..PAGES {
        vmcopy::write(&mem, base + page * PAGE, &content(page)).unwrap();
    }

    let mut lender = Lender::of(child).unwrap().unwrap();
    let (near, mut far) = UnixStream::pair().unwrap();
    let span = |page: u64, pages: u64| Span {
        address: base + page * PAGE,
        len: (pages * PAGE) as usize,
    };
    for spans in [
        vec![(0, PAGES)],
        vec![(200, 3), (7, 1), (20, 40)],
        (0..64).map(|i| (2 * i, 1)).collect(),
    ] {
        let expected: Vec<u8> = spans.iter().flat_map(|(p, n)| *p..p + n).flat_map(content).collect();
        let loan = lender
            .borrow(&spans.iter().map(|(p, n)| span(*p, *n)).collect::<Vec<_>>())
            .unwrap();
        let (there, length) = (near.try_clone().unwrap(), expected.len());
        let sending = std::thread::spawn(move || loan.send(&there, false).unwrap());
        let mut got = vec![0; length];
        far.read_exact(&mut got).unwrap();
        assert!(got == expected, "other bytes came");
        lender = sending.join().unwrap();
    }
    // The part of a loan that could be had is in the pipe: there are no more.
    lender.borrow(&[span(0, 1), span(1 << 30, 1)]).unwrap_err();
    assert!(
        Lender::of(child).unwrap().is_none(),
        "another borrower might get what the first has left"
    );
    assert!(Lender::of(pid).unwrap().is_none(), "the program itself lends nothing");
}
