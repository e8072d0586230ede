package testnet

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// server is one address that answers.
type server struct {
	network, address string
	dns, http        bool
}

func (n *Net) servers() []server {
	var all []server
	add := func(list []string, port string, s server) {
		for _, address := range n.Addresses(list, port) {
			for _, network := range []string{"tcp", "udp"} {
				if s.http && network == "udp" {
					continue
				}
				s.network, s.address = network, address
				all = append(all, s)
			}
		}
	}
	add(Loopback, Port, server{})
	add(LAN, Port, server{})
	add(DNS, DNSPort, server{dns: true})
	add(Metadata, HTTPPort, server{http: true})
	return all
}

func (n *Net) serve() error {
	for _, s := range n.servers() {
		if s.network == "udp" {
			c, err := net.ListenPacket("udp", s.address)
			if err != nil {
				return err
			}
			n.closers = append(n.closers, c.Close)
			n.wg.Go(func() { s.datagrams(c) })
			continue
		}
		l, err := net.Listen("tcp", s.address)
		if err != nil {
			return err
		}
		n.closers = append(n.closers, l.Close)
		n.wg.Go(func() { s.streams(l, &n.wg) })
	}
	return nil
}

func (s server) datagrams(c net.PacketConn) {
	b := make([]byte, 2048)
	for {
		got, from, err := c.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		answer := b[:got]
		if s.dns {
			if answer, err = answerName(b[:got]); err != nil {
				continue
			}
		}
		_, _ = c.WriteTo(answer, from) // who asked may be gone
	}
}

// streams answers each connection with one line, or one HTTP answer.
func (s server) streams(l net.Listener, wg *sync.WaitGroup) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		wg.Go(func() {
			defer c.Close()
			if s.http {
				if _, err := bufio.NewReader(io.LimitReader(c, 4096)).ReadString('\n'); err != nil {
					return
				}
				_, _ = io.WriteString(c, "HTTP/1.0 200 OK\r\n\r\ni-0123456789abcdef0\n")
				return
			}
			_, _ = io.WriteString(c, "here\n")
		})
	}
}

// answerName answers any question for a name.
func answerName(question []byte) ([]byte, error) {
	var p dnsmessage.Parser
	h, err := p.Start(question)
	if err != nil {
		return nil, err
	}
	q, err := p.Question()
	if err != nil {
		return nil, err
	}
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: h.ID, Response: true, RecursionAvailable: true},
		Questions: []dnsmessage.Question{q},
		Answers: []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET, TTL: 60},
			Body:   &dnsmessage.AResource{A: [4]byte{10, 213, 7, 1}},
		}},
	}
	return m.Pack()
}

// Question asks a name server for a name.
func Question() []byte {
	m := dnsmessage.Message{
		Header: dnsmessage.Header{ID: 0x1c1a, RecursionDesired: true},
		Questions: []dnsmessage.Question{{
			Name: dnsmessage.MustNewName("secret.attacker.example."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET,
		}},
	}
	b, err := m.Pack()
	if err != nil {
		panic(err) // a constant
	}
	return b
}

// askUntil asks again for a while: the kernel makes the ways to new IPv6 addresses
// in its own time.
func (s server) askUntil(end time.Time) error {
	for {
		err := s.ask()
		if err == nil || time.Now().After(end) {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// askTime bounds one question.
const askTime = 500 * time.Millisecond

// ask speaks to the server as a client would.
func (s server) ask() error {
	c, err := net.DialTimeout(s.network, s.address, askTime)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(askTime))
	say := []byte("GET / HTTP/1.0\n\n")
	if s.dns {
		say = Question()
	}
	if s.network == "udp" || s.http {
		if _, err := c.Write(say); err != nil {
			return err
		}
	}
	b := make([]byte, 512)
	got, err := c.Read(b)
	if err != nil {
		return err
	}
	switch {
	case s.network == "udp" && s.dns:
		var m dnsmessage.Message
		if err := m.Unpack(b[:got]); err != nil || len(m.Answers) != 1 {
			return fmt.Errorf("no answer in %q (%w)", b[:got], err)
		}
	case s.http && !strings.HasPrefix(string(b[:got]), "HTTP/1.0 200"):
		return fmt.Errorf("it answers %q", b[:got])
	}
	return nil
}
