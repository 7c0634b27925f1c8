//! The steering programs pass the kernel's verifier, and their tables mean what crates/sys/src/steer.rs says.

use dunlin_sys::steer::{self, Entry, Name};
use std::os::fd::AsFd;
use std::time::Duration;

#[test]
fn the_kernel_takes_the_programs_and_the_tables_speak_our_language() {
    let (programs, tables) = steer::load().unwrap();
    assert_eq!(programs.fds().len(), steer::Programs::COUNT);
    let fds = tables.fds().into_iter().map(|fd| fd.try_clone_to_owned().unwrap());
    let again = steer::Tables::from_fds(fds.collect()).unwrap();
    let port = Name {
        proto: 6,
        six: true,
        port: 8080,
        peer: None,
    };
    let flow = Name {
        peer: Some("[2001:db8::7]:4711".parse().unwrap()),
        ..port
    };
    let entry = Entry {
        hop: 3,
        hold: true,
        seen: 1,
        epoch: u64::MAX - 1,
        packets: 2,
        bytes: 3,
        used: Duration::from_nanos(4),
    };
    for name in [port, flow] {
        assert_eq!(tables.get(&name).unwrap(), None);
        tables.set(&name, &entry).unwrap();
        assert_eq!(again.get(&name).unwrap(), Some(entry));
    }
    assert_eq!(again.entries().unwrap(), [(port, entry), (flow, entry)]);
    assert!(again.remove(&flow).unwrap() && !tables.remove(&flow).unwrap());
    assert_eq!(tables.learned().unwrap(), []);
    assert_eq!(tables.counters().unwrap(), steer::Counters::default());
    assert!(programs.park_in.as_fd().try_clone_to_owned().is_ok());
}
