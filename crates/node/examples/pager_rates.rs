//! How fast the pager is on this machine, beside one raw TCP stream and a bare round trip over the same link.
//!
//! `cargo run --release -p dunlin-node --example pager_rates [MIB]`; prints one line of JSON.

#[path = "../tests/pager_rig/mod.rs"]
mod pager_rig;

use dunlin_node::pager::Pager;
use pager_rig::*;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

fn main() {
    let mib: u64 = std::env::args()
        .nth(1)
        .map_or(256, |a| a.parse().expect("a number of MiB"));
    let pages = mib * 256;
    let raw = raw_stream(mib);
    let (floor50, floor99) = round_trips();
    let region = [(BASE, pages)];
    let source = filled(&region, 1);
    let holder = Holder::new(1);

    // Drain of an idle program.
    let (image, _unused) = holder.register(&source, &region);
    let (program, uffd) = watched(&region);
    let cpu = cpu_seconds();
    let space = adopt(&Pager::new(), &program, uffd, map_of(&region, image), &[&holder]);
    space.wait_finished(LONG).expect("drained");
    let drain = mib as f64 / space.progress().elapsed.as_secs_f64();
    let cpu_us_per_page = (cpu_seconds() - cpu) * 1e6 / pages as f64;
    drop(program);

    // A sequential sweep, and the same of one that has all its pages.
    let (image, _unused) = holder.register(&source, &region);
    let (program, uffd) = watched(&region);
    let space = adopt(&Pager::new(), &program, uffd, map_of(&region, image), &[&holder]);
    let started = Instant::now();
    program.hand(0).sweep(BASE, pages, 1, 1).unwrap();
    let sweep = started.elapsed().as_secs_f64();
    let swept = space.progress();
    space.wait_finished(LONG).expect("drained");
    drop(program);

    // Faults of a program whose pages are not pushed: one at a time, far apart.
    let (image, _unused) = holder.register(&source, &region);
    let (program, uffd) = watched(&region);
    let space = adopt(&Pager::new(), &program, uffd, map_of(&region, image), &[&holder]);
    program.hand(0).sweep(BASE, pages, 7919, 1).unwrap();
    let random = space.progress();
    space.wait_finished(LONG).expect("drained");

    println!(
        "{{\"mib\":{mib},\"raw_mib_s\":{raw:.0},\"drain_mib_s\":{drain:.0},\"drain_ratio\":{:.2},\
         \"cpu_us_per_page\":{cpu_us_per_page:.2},\
         \"round_trip_us\":{{\"p50\":{floor50:.1},\"p99\":{floor99:.1}}},\
         \"sweep_s\":{sweep:.3},\"sweep_faults\":{},\"sweep_fault_us\":{{\"p50\":{:.1},\"p99\":{:.1}}},\
         \"random_faults\":{},\"random_fault_us\":{{\"p50\":{:.1},\"p99\":{:.1}}}}}",
        drain / raw,
        swept.pages_faulted,
        swept.fault_us.p50,
        swept.fault_us.p99,
        random.pages_faulted,
        random.fault_us.p50,
        random.fault_us.p99,
    );
}

/// User and system time of this process and its dead children.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("stat");
    let after = stat.rsplit(')').next().expect("fields");
    let ticks: f64 = after
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|f| f.parse::<f64>().expect("ticks"))
        .sum();
    ticks / 100.0
}

/// One TCP stream over loopback, 256 KiB at a time.
fn raw_stream(mib: u64) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let sender = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        let piece = vec![7u8; 256 << 10];
        (0..mib * 4).for_each(|_| stream.write_all(&piece).expect("a reader"));
    });
    let mut stream = TcpStream::connect(address).expect("a server");
    let mut piece = vec![0u8; 256 << 10];
    let started = Instant::now();
    (0..mib * 4).for_each(|_| stream.read_exact(&mut piece).expect("bytes"));
    sender.join().expect("the sender");
    mib as f64 / started.elapsed().as_secs_f64()
}

/// 24 bytes there, a page and its header back, both ends awake: what no fault over TCP can beat.
fn round_trips() -> (f64, f64) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        stream.set_nodelay(true).expect("nodelay");
        stream.set_nonblocking(true).expect("nonblocking");
        let (mut request, page) = ([0u8; 24], [7u8; 24 + 4096]);
        loop {
            match stream.read(&mut request) {
                Ok(0) => return,
                Ok(_) => stream.write_all(&page).expect("a reader"),
                Err(_) => std::thread::yield_now(),
            }
        }
    });
    let mut stream = TcpStream::connect(address).expect("a server");
    stream.set_nodelay(true).expect("nodelay");
    stream.set_nonblocking(true).expect("nonblocking");
    let mut page = [0u8; 24 + 4096];
    let mut took: Vec<f64> = (0..20_000)
        .map(|_| {
            let started = Instant::now();
            stream.write_all(&[1u8; 24]).expect("a server");
            let mut got = 0;
            while got < page.len() {
                match stream.read(&mut page[got..]) {
                    Ok(n) => got += n,
                    Err(_) => std::thread::yield_now(),
                }
            }
            started.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    took.sort_by(f64::total_cmp);
    (took[took.len() / 2], took[took.len() * 99 / 100])
}
