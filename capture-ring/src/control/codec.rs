//! Messages to bytes and back. Pure.

use journal_format::ImageTag;

use crate::control::{DiskInfo, Hello, MESSAGE_HEADER_BYTES, MESSAGE_MAGIC, Message, PROTOCOL_VERSION, text};
use crate::error::{RingError, RingErrorKind};
use crate::limits::MAX_MESSAGE_BYTES;

const KIND_HELLO: u16 = 1;
const KIND_DISKS: u16 = 2;
const KIND_LIST: u16 = 3;
const KIND_ATTACH: u16 = 4;
const KIND_DETACH: u16 = 5;
const KIND_RESYNC: u16 = 6;
const KIND_RESULT: u16 = 7;
const KIND_FAULT: u16 = 8;
const KIND_HELD: u16 = 9;
const KIND_HOLD: u16 = 10;
const KIND_FORGET: u16 = 11;

/// Encodes a message. Texts for people are cut to their limit; names are not.
///
/// # Errors
/// `Message` when a name or the whole is over its limit (split a list of disks with `more`).
pub fn encode(message: &Message) -> Result<Vec<u8>, RingError> {
    let mut out = Writer(vec![0; MESSAGE_HEADER_BYTES]);
    let kind = out.message(message)?;
    let mut out = out.0;
    let body = out.len().saturating_sub(MESSAGE_HEADER_BYTES);
    if out.len() > MAX_MESSAGE_BYTES {
        return Err(bad("a control message is longer than 64 KiB"));
    }
    let [b0, b1, b2, b3] = (body as u32).to_le_bytes();
    let [k0, k1] = kind.to_le_bytes();
    let [v0, v1] = PROTOCOL_VERSION.to_le_bytes();
    let [m0, m1, m2, m3] = MESSAGE_MAGIC;
    let header = [m0, m1, m2, m3, v0, v1, k0, k1, b0, b1, b2, b3, 0, 0, 0, 0];
    if let Some(place) = out.first_chunk_mut() {
        *place = header;
    }
    Ok(out)
}

/// Decodes one whole message.
///
/// # Errors
/// `Message` with what is wrong: magic, version, length, kind, a text over its limit or not UTF-8, bytes left over.
pub fn decode(bytes: &[u8]) -> Result<Message, RingError> {
    if bytes.len() > MAX_MESSAGE_BYTES {
        return Err(bad("a control message is longer than 64 KiB"));
    }
    let mut reader = Reader(bytes);
    if reader.array()? != MESSAGE_MAGIC {
        return Err(bad("the peer does not speak the control protocol"));
    }
    if reader.u16()? != PROTOCOL_VERSION {
        return Err(bad("the peer speaks another version of the control protocol; upgrade the older side"));
    }
    let kind = reader.u16()?;
    let (body_bytes, reserved) = (reader.u32()?, reader.u32()?);
    if reserved != 0 || body_bytes as usize != reader.0.len() {
        return Err(bad("a control message's length or reserved field is wrong"));
    }
    let message = reader.message(kind)?;
    if reader.0.is_empty() { Ok(message) } else { Err(bad("a control message has bytes left over")) }
}

fn bad(what: &'static str) -> RingError {
    RingError::new(RingErrorKind::Message, what)
}

struct Writer(Vec<u8>);

impl Writer {
    fn put(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// A name: refused when too long, because a cut one names something else.
    fn name(&mut self, name: &str, most: usize) -> Result<(), RingError> {
        if name.len() > most {
            return Err(bad("a name is too long for a control message"));
        }
        self.put(&(name.len() as u16).to_le_bytes());
        self.put(name.as_bytes());
        Ok(())
    }

    /// A text for people: cut at a character when too long.
    fn prose(&mut self, text: &str, most: usize) -> Result<(), RingError> {
        self.name(text.get(..text.floor_char_boundary(most)).unwrap_or(""), most)
    }

    fn message(&mut self, message: &Message) -> Result<u16, RingError> {
        match message {
            Message::Hello(hello) => self.hello(hello),
            Message::Disks { disks, more } => self.disks(disks, *more),
            Message::List => Ok(KIND_LIST),
            Message::Attach { request, device, image } => {
                self.command(KIND_ATTACH, *request, device)?;
                self.put(&[u8::from(image.is_some())]);
                self.put(&image.map_or([0; 16], |image| image.0));
                Ok(KIND_ATTACH)
            }
            Message::Detach { request, device } => self.command(KIND_DETACH, *request, device),
            Message::Resync { request, device } => self.command(KIND_RESYNC, *request, device),
            Message::Result { request, ok, message } => {
                self.put(&request.to_le_bytes());
                self.put(&[u8::from(*ok)]);
                self.prose(message, text::MESSAGE)?;
                Ok(KIND_RESULT)
            }
            Message::Fault { device, message } => {
                self.name(device, text::DEVICE)?;
                self.prose(message, text::MESSAGE)?;
                Ok(KIND_FAULT)
            }
            Message::Held { device, ended } => {
                self.name(device, text::DEVICE)?;
                self.put(&[u8::from(*ended)]);
                Ok(KIND_HELD)
            }
            Message::Hold { request, device } => self.command(KIND_HOLD, *request, device),
            Message::Forget { device } => {
                self.name(device, text::DEVICE)?;
                Ok(KIND_FORGET)
            }
        }
    }

    fn hello(&mut self, hello: &Hello) -> Result<u16, RingError> {
        self.put(&hello.protocol.to_le_bytes());
        self.put(&hello.pid.to_le_bytes());
        self.put(&hello.vm_uuid);
        self.prose(&hello.program, text::PROGRAM)?;
        self.prose(&hello.qemu_version, text::QEMU_VERSION)?;
        self.name(&hello.vm_name, text::VM_NAME)?;
        self.prose(&hello.refused, text::REFUSED)?;
        Ok(KIND_HELLO)
    }

    fn disks(&mut self, disks: &[DiskInfo], more: bool) -> Result<u16, RingError> {
        let count = u16::try_from(disks.len()).map_err(|_| bad("too many disks for one control message"))?;
        self.put(&[u8::from(more)]);
        self.put(&count.to_le_bytes());
        for disk in disks {
            self.put(&disk.disk_bytes.to_le_bytes());
            self.put(&[u8::from(disk.read_only)]);
            self.name(&disk.device, text::DEVICE)?;
            self.name(&disk.node, text::NODE)?;
            self.name(&disk.driver, text::DRIVER)?;
            self.prose(&disk.refused, text::REFUSED)?;
        }
        Ok(KIND_DISKS)
    }

    fn command(&mut self, kind: u16, request: u64, device: &str) -> Result<u16, RingError> {
        self.put(&request.to_le_bytes());
        self.name(device, text::DEVICE)?;
        Ok(kind)
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], RingError> {
        let (now, rest) = self.0.split_first_chunk().ok_or(bad("a control message is cut"))?;
        self.0 = rest;
        Ok(*now)
    }

    fn bytes(&mut self, count: usize) -> Result<&'a [u8], RingError> {
        let (now, rest) = self.0.split_at_checked(count).ok_or(bad("a control message is cut"))?;
        self.0 = rest;
        Ok(now)
    }

    fn u16(&mut self) -> Result<u16, RingError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, RingError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, RingError> {
        self.array().map(u64::from_le_bytes)
    }

    fn flag(&mut self) -> Result<bool, RingError> {
        match self.array()? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(bad("a flag in a control message is neither 0 nor 1")),
        }
    }

    fn text(&mut self, most: usize) -> Result<String, RingError> {
        let length = usize::from(self.u16()?);
        if length > most {
            return Err(bad("a text in a control message is over its limit"));
        }
        let text = core::str::from_utf8(self.bytes(length)?);
        text.map(str::to_owned).map_err(|_| bad("a text in a control message is not UTF-8"))
    }

    fn message(&mut self, kind: u16) -> Result<Message, RingError> {
        Ok(match kind {
            KIND_HELLO => Message::Hello(self.hello()?),
            KIND_DISKS => self.disks()?,
            KIND_LIST => Message::List,
            KIND_ATTACH => {
                let (request, device) = (self.u64()?, self.text(text::DEVICE)?);
                let image = match (self.flag()?, self.array::<16>()?) {
                    (true, image) => Some(ImageTag(image)),
                    (false, zeroes) if zeroes == [0; 16] => None,
                    _ => return Err(bad("a control message has an image tag that it says it has not")),
                };
                Message::Attach { request, device, image }
            }
            KIND_DETACH => Message::Detach { request: self.u64()?, device: self.text(text::DEVICE)? },
            KIND_RESYNC => Message::Resync { request: self.u64()?, device: self.text(text::DEVICE)? },
            KIND_RESULT => {
                let (request, ok) = (self.u64()?, self.flag()?);
                Message::Result { request, ok, message: self.text(text::MESSAGE)? }
            }
            KIND_FAULT => {
                Message::Fault { device: self.text(text::DEVICE)?, message: self.text(text::MESSAGE)? }
            }
            KIND_HELD => Message::Held { device: self.text(text::DEVICE)?, ended: self.flag()? },
            KIND_HOLD => Message::Hold { request: self.u64()?, device: self.text(text::DEVICE)? },
            KIND_FORGET => Message::Forget { device: self.text(text::DEVICE)? },
            _ => return Err(bad("a control message of unknown kind; upgrade the older side")),
        })
    }

    fn hello(&mut self) -> Result<Hello, RingError> {
        let (protocol, pid, vm_uuid) = (self.u16()?, self.u32()?, self.array()?);
        Ok(Hello {
            protocol,
            pid,
            vm_uuid,
            program: self.text(text::PROGRAM)?,
            qemu_version: self.text(text::QEMU_VERSION)?,
            vm_name: self.text(text::VM_NAME)?,
            refused: self.text(text::REFUSED)?,
        })
    }

    /// Allocates as it reads, never what the count says.
    fn disks(&mut self) -> Result<Message, RingError> {
        let (more, count) = (self.flag()?, self.u16()?);
        let mut disks = Vec::new();
        for _ in 0..count {
            let (disk_bytes, read_only) = (self.u64()?, self.flag()?);
            disks.push(DiskInfo {
                device: self.text(text::DEVICE)?,
                node: self.text(text::NODE)?,
                driver: self.text(text::DRIVER)?,
                disk_bytes,
                read_only,
                refused: self.text(text::REFUSED)?,
            });
        }
        Ok(Message::Disks { disks, more })
    }
}
